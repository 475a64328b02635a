// The stage that sets a gradient to zeros, for the next one to be added into.
#pragma once

#include "lanes.hpp"

namespace fused_adam {
namespace {

template <class F>
void clear_grad(void* grad, int64_t count) {
  using T = typename F::Scalar;
  const F zero = F::broadcast(T(0));
  for_vectors<F>(count,
                 [&](int64_t i, auto lanes) { lanes.store(static_cast<T*>(grad) + i, zero); });
}

}  // namespace
}  // namespace fused_adam
