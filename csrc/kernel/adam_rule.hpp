// The formula. It knows values, not storage: no loads, no loops, no intrinsics.
//
// Operation for operation what the vector loop of PyTorch's fused CPU Adam computes (2.13.0):
//
//   m  = m + (1 - beta1) * (g - m)
//   v  = beta2 * v + (1 - beta2) * g**2
//   p -= lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
//
// (or with eps inside the root: sqrt(v + eps * (1 - beta2**t)), and none outside)
// in two halves, since a kernel is faster that runs them apart (adam_kernel.hpp).
// tests/reference.py is the same in NumPy. Whoever changes a rounding here changes kNumerics.
#pragma once

#include "../coefficients.hpp"

namespace fused_adam {
namespace {

// What the second half needs of the first: the step of a parameter is numerator / denominator,
// whose denominator is made of root.
template <class F>
struct Fraction {
  F numerator, root;
};

// form: which terms there are, flags or constants: l2, amsgrad, lerp_from_grad and eps_in_root (see
// StepCoefficients for these two).
template <class F, class Form>
inline Fraction<F> update_moments(F param, F grad, F& exp_avg, F& exp_avg_sq, F& max_exp_avg_sq,
                                  const Coefficients<F>& k, Form form) {
  grad = flip_sign(grad, k.grad_sign);
  if (form.l2) grad = fma(param, k.l2_decay, grad);

  const F change = sub(grad, exp_avg);
  if (form.lerp_from_grad) {
    exp_avg = fma(k.lerp_weight, change, grad);
  } else {
    exp_avg = fma(k.lerp_weight, change, exp_avg);
  }
  exp_avg_sq = fma(k.one_minus_beta2 * grad, grad, exp_avg_sq * k.beta2);

  F second_moment = exp_avg_sq;
  if (form.amsgrad) {
    max_exp_avg_sq = max_or_nan(max_exp_avg_sq, exp_avg_sq);
    second_moment = max_exp_avg_sq;
  }
  if (form.eps_in_root) second_moment = add(second_moment, k.eps_root);
  return {k.neg_step_size * exp_avg, sqrt(second_moment)};
}

// exact: or with a denominator of one rounding less, which takes three operations less. Moments
// that are stored in fewer bytes have no bits that anybody else has, and of them that is 18 %
// (AVX2; 13 % in AVX-512, bfloat16, in cache).
template <bool exact, class F>
inline F update_param(F param, Fraction<F> step, const Coefficients<F>& k) {
  if constexpr (!exact) {
    const F short_denominator = fma(step.root, k.reciprocal_sqrt_correction2, k.eps);
    return add(param * k.param_decay, step.numerator / short_denominator);
  }
  // root / sqrt_correction2 without the divider: the quotient by the rounded reciprocal, its exact
  // remainder, one correction. Correctly rounded: 0 wrong for each of the 2**23 float32 mantissas
  // by each of 50,000 divisors. It saves 15 % in AVX2 and 18 % in float64.
  const F quotient = step.root * k.reciprocal_sqrt_correction2;
  const F remainder = fma(quotient, k.neg_sqrt_correction2, step.root);
  const F corrected = fma(remainder, k.reciprocal_sqrt_correction2, quotient);
  // The correction is 2**-26.5 to 1: nothing overflows, and corrected >= root. But the remainder of
  // an infinite root is NaN; there, max gives the root.
  const F denominator = add(max(corrected, step.root), k.eps);
  return add(param * k.param_decay, step.numerator / denominator);
}

}  // namespace
}  // namespace fused_adam
