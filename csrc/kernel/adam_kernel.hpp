// Load, rule, store over a slice. The tail runs the same rule on a part of a vector.
#pragma once

#include "adam_rule.hpp"
#include "kernel.hpp"

namespace fused_adam {
namespace {

template <class F>
struct WholeVector {
  using T = typename F::Scalar;
  F load(const T* p) const { return F::load(p); }
  void store(T* p, F x) const { fused_adam::store(p, x); }
};

template <class F>
struct FirstLanes {
  using T = typename F::Scalar;
  int n;
  F load(const T* p) const { return F::load_n(p, n); }
  void store(T* p, F x) const { fused_adam::store_n(p, x, n); }
};

inline const StepCoefficients<float>& of_type(const CoefficientSet& all, float) { return all.f32; }
inline const StepCoefficients<double>& of_type(const CoefficientSet& all, double) {
  return all.f64;
}

template <class F>
inline Coefficients<F> broadcast(const Coefficients<typename F::Scalar>& k) {
  return {F::broadcast(k.grad_sign),
          F::broadcast(k.l2_decay),
          F::broadcast(k.param_decay),
          F::broadcast(k.lerp_weight),
          F::broadcast(k.one_minus_beta2),
          F::broadcast(k.beta2),
          F::broadcast(k.neg_sqrt_correction2),
          F::broadcast(k.reciprocal_sqrt_correction2),
          F::broadcast(k.eps),
          F::broadcast(k.neg_step_size)};
}

template <class F, bool l2, bool amsgrad>
void adam_kernel(const Streams& streams, int64_t begin, int64_t end, const CoefficientSet& all) {
  using T = typename F::Scalar;
  T* const param = static_cast<T*>(streams.param);
  const T* const grad = static_cast<const T*>(streams.grad);
  T* const exp_avg = static_cast<T*>(streams.exp_avg);
  T* const exp_avg_sq = static_cast<T*>(streams.exp_avg_sq);
  T* const max_exp_avg_sq = static_cast<T*>(streams.max_exp_avg_sq);
  const StepCoefficients<T>& narrowed = of_type(all, T());
  const Coefficients<F> k = broadcast<F>(narrowed.k);
  const bool lerp_from_grad = narrowed.lerp_from_grad;

  const auto update = [&](int64_t i, auto lanes) {
    F p = lanes.load(param + i);
    const F g = lanes.load(grad + i);
    F m = lanes.load(exp_avg + i);
    F v = lanes.load(exp_avg_sq + i);
    F v_max = v;
    if constexpr (amsgrad) v_max = lanes.load(max_exp_avg_sq + i);
    adam_rule<l2, amsgrad>(p, g, m, v, v_max, k, lerp_from_grad);
    lanes.store(param + i, p);
    lanes.store(exp_avg + i, m);
    lanes.store(exp_avg_sq + i, v);
    if constexpr (amsgrad) lanes.store(max_exp_avg_sq + i, v_max);
  };

  int64_t i = begin;
  for (; i + F::width <= end; i += F::width) update(i, WholeVector<F>{});
  if (i < end) update(i, FirstLanes<F>{static_cast<int>(end - i)});
}

}  // namespace
}  // namespace fused_adam
