// The stage that sets a gradient to zeros, for the next one to be added into.
#pragma once

#include "lanes.hpp"

namespace fused_adam {
namespace {

template <class F>
void clear_stage(const Streams& streams, int64_t count, const CoefficientSet&) {
  using T = typename F::Scalar;
  T* const grad = stream<T>(streams, kGrad);
  const F zero = F::broadcast(T(0));
  for_vectors<F>(count, [&](int64_t i, auto lanes) { lanes.store(grad + i, zero); });
}

}  // namespace
}  // namespace fused_adam
