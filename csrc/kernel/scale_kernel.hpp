// The stage that prepares a gradient for the rule, which reads it from `scaled` then:
//
//   scaled = clamp(grad / scale * clip, -bound, bound)
//
// one rounding for each operation. What is not asked for is an exact no-op: 1, 1 and infinity.
#pragma once

#include "lanes.hpp"

namespace fused_adam {
namespace {

// divides: else the scale is the reciprocal of a power of two, and a product is the same number.
template <class F, bool divides>
void scale_grad(const void* grad, void* scaled, int64_t count, const GradCoefficientSet& all) {
  using T = typename F::Scalar;
  const auto& narrowed = of_type(all, T());
  const F scale = F::broadcast(narrowed.scale), clip = F::broadcast(narrowed.clip);
  const F lowest = F::broadcast(-narrowed.bound), minus = F::broadcast(T(-0.0));
  for_vectors<F>(count, [&](int64_t i, auto lanes) {
    const F g = lanes.load(static_cast<const T*>(grad) + i);
    const F x = (divides ? g / scale : g * scale) * clip;
    // In this order max gives back what is NaN.
    const F from_below = max(lowest, x);
    const F clamped = flip_sign(max(lowest, flip_sign(from_below, minus)), minus);
    lanes.store(static_cast<T*>(scaled) + i, clamped);
  });
}

}  // namespace
}  // namespace fused_adam
