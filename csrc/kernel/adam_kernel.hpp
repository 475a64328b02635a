// The stage that is Adam: load, rule, store, vector by vector. The tail runs the same rule on a
// part of one.
#pragma once

#include "adam_rule.hpp"
#include "lanes.hpp"

namespace fused_adam {
namespace {

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
          F::broadcast(k.eps_root),
          F::broadcast(k.eps),
          F::broadcast(k.neg_step_size)};
}

template <bool with_l2, bool with_amsgrad, bool from_grad, bool in_root>
struct FixedForm {
  static constexpr bool l2 = with_l2, amsgrad = with_amsgrad;
  static constexpr bool lerp_from_grad = from_grad, eps_in_root = in_root;
};

template <class F, class Form>
void adam_update(const Streams& streams, int64_t count,
                 const Coefficients<typename F::Scalar>& narrowed) {
  using T = typename F::Scalar;
  T* const param = stream<T>(streams, kParam);
  const T* const grad = stream<const T>(streams, kGrad);
  T* const exp_avg = stream<T>(streams, kExpAvg);
  T* const exp_avg_sq = stream<T>(streams, kExpAvgSq);
  T* const max_exp_avg_sq = stream<T>(streams, kMaxExpAvgSq);
  const Coefficients<F> k = broadcast<F>(narrowed);

  const auto first_half = [&](int64_t i, auto lanes) {
    const F g = lanes.load(grad + i);
    F m = lanes.load(exp_avg + i);
    F v = lanes.load(exp_avg_sq + i);
    F p = g, v_max = v;
    if constexpr (Form::l2) p = lanes.load(param + i);
    if constexpr (Form::amsgrad) v_max = lanes.load(max_exp_avg_sq + i);
    const Fraction<F> step = update_moments(p, g, m, v, v_max, k, Form{});
    lanes.store(exp_avg + i, m);
    lanes.store(exp_avg_sq + i, v);
    if constexpr (Form::amsgrad) lanes.store(max_exp_avg_sq + i, v_max);
    return step;
  };
  const auto second_half = [&](int64_t i, Fraction<F> step, auto lanes) {
    lanes.store(param + i, update_param<true>(lanes.load(param + i), step, k));
  };

  // The first half runs one vector ahead. A param waits for a root, then for a division by it; a
  // CPU sees only so many instructions ahead, and more vectors in them if that chain is cut in two.
  // 3 to 4 % in AVX2 float32, 10 % at times when other machines on the host are busy.
  constexpr WholeVector<F> whole{};
  int64_t i = 0;
  if (i + F::width <= count) {
    Fraction<F> step = first_half(i, whole);
    for (; i + 2 * F::width <= count; i += F::width) {
      const Fraction<F> next = first_half(i + F::width, whole);
      second_half(i, step, whole);
      step = next;
    }
    second_half(i, step, whole);
    i += F::width;
  }
  if (i < count) {
    const FirstLanes<F> lanes{static_cast<int>(count - i)};
    second_half(i, first_half(i, lanes), lanes);
  }
}

// Chosen here and not in the rule, where it became a select by address, by way of the stack: 5 %
// slower in AVX2, 11 % in AVX-512 float32.
template <class F, bool l2, bool amsgrad>
void adam_stage(const Streams& streams, int64_t count, const CoefficientSet& all) {
  const auto& narrowed = of_type(all, typename F::Scalar());
  constexpr decltype(&adam_update<F, FixedForm<l2, amsgrad, false, false>>) updates[2][2] = {
      {adam_update<F, FixedForm<l2, amsgrad, false, false>>,
       adam_update<F, FixedForm<l2, amsgrad, false, true>>},
      {adam_update<F, FixedForm<l2, amsgrad, true, false>>,
       adam_update<F, FixedForm<l2, amsgrad, true, true>>}};
  updates[narrowed.lerp_from_grad][narrowed.eps_in_root](streams, count, narrowed.k);
}

}  // namespace
}  // namespace fused_adam
