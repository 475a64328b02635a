// The stage that adds a gradient to another: sum = sum + grad.
#pragma once

#include "lanes.hpp"

namespace fused_adam {
namespace {

template <class F>
void add_grad(const void* grad, void* sum, int64_t count) {
  using T = typename F::Scalar;
  const T* const from = static_cast<const T*>(grad);
  T* const to = static_cast<T*>(sum);
  for_vectors<F>(count, [&](int64_t i, auto lanes) {
    lanes.store(to + i, add(lanes.load(to + i), lanes.load(from + i)));
  });
}

}  // namespace
}  // namespace fused_adam
