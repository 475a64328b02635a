// Load, rule, store over a slice, vector by vector. The tail runs the same rule on a part of one.
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

template <class F, bool l2, bool amsgrad, bool lerp_from_grad>
void update_slice(const Streams& streams, int64_t begin, int64_t end,
                  const Coefficients<typename F::Scalar>& narrowed) {
  using T = typename F::Scalar;
  T* const param = static_cast<T*>(streams.param);
  const T* const grad = static_cast<const T*>(streams.grad);
  T* const exp_avg = static_cast<T*>(streams.exp_avg);
  T* const exp_avg_sq = static_cast<T*>(streams.exp_avg_sq);
  T* const max_exp_avg_sq = static_cast<T*>(streams.max_exp_avg_sq);
  const Coefficients<F> k = broadcast<F>(narrowed);

  const auto first_half = [&](int64_t i, auto lanes) {
    const F g = lanes.load(grad + i);
    F m = lanes.load(exp_avg + i);
    F v = lanes.load(exp_avg_sq + i);
    F p = g, v_max = v;
    if constexpr (l2) p = lanes.load(param + i);
    if constexpr (amsgrad) v_max = lanes.load(max_exp_avg_sq + i);
    const Fraction<F> step = update_moments<l2, amsgrad, lerp_from_grad>(p, g, m, v, v_max, k);
    lanes.store(exp_avg + i, m);
    lanes.store(exp_avg_sq + i, v);
    if constexpr (amsgrad) lanes.store(max_exp_avg_sq + i, v_max);
    return step;
  };
  const auto second_half = [&](int64_t i, Fraction<F> step, auto lanes) {
    lanes.store(param + i, update_param(lanes.load(param + i), step, k));
  };

  // The first half runs one vector ahead. A param waits for a root, then for a division by it; a
  // CPU sees only so many instructions ahead, and more vectors in them if that chain is cut in two.
  // 3 to 4 % in AVX2 float32, 10 % at times when other machines on the host are busy.
  constexpr WholeVector<F> whole{};
  int64_t i = begin;
  if (i + F::width <= end) {
    Fraction<F> step = first_half(i, whole);
    for (; i + 2 * F::width <= end; i += F::width) {
      const Fraction<F> next = first_half(i + F::width, whole);
      second_half(i, step, whole);
      step = next;
    }
    second_half(i, step, whole);
    i += F::width;
  }
  if (i < end) {
    const FirstLanes<F> lanes{static_cast<int>(end - i)};
    second_half(i, first_half(i, lanes), lanes);
  }
}

// Chosen here and not in the rule, where it became a select by address, by way of the stack: 5 %
// slower in AVX2, 11 % in AVX-512 float32.
template <class F, bool l2, bool amsgrad>
void adam_kernel(const Streams& streams, int64_t begin, int64_t end, const CoefficientSet& all) {
  const auto& narrowed = of_type(all, typename F::Scalar());
  const auto update = narrowed.lerp_from_grad ? update_slice<F, l2, amsgrad, true>
                                              : update_slice<F, l2, amsgrad, false>;
  update(streams, begin, end, narrowed.k);
}

}  // namespace
}  // namespace fused_adam
