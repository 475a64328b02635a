// The formula. It knows values, not storage: no loads, no loops, no intrinsics.
//
// Operation for operation what the vector loop of PyTorch's fused CPU Adam computes (2.13.0):
//
//   m  = m + (1 - beta1) * (g - m)
//   v  = beta2 * v + (1 - beta2) * g**2
//   p -= lr / (1 - beta1**t) * m / (sqrt(v) / sqrt(1 - beta2**t) + eps)
//
// tests/reference.py is the same in NumPy. Whoever changes a rounding here changes kNumerics.
#pragma once

#include "../coefficients.hpp"

namespace fused_adam {
namespace {

template <bool l2, bool amsgrad, class F>
inline void adam_rule(F& param, F grad, F& exp_avg, F& exp_avg_sq, F& max_exp_avg_sq,
                      const Coefficients<F>& k, bool lerp_from_grad) {
  grad = grad * k.grad_sign;
  if constexpr (l2) grad = fma(param, k.l2_decay, grad);
  param = param * k.param_decay;

  exp_avg = fma(k.lerp_weight, sub(grad, exp_avg), lerp_from_grad ? grad : exp_avg);
  exp_avg_sq = fma(k.one_minus_beta2 * grad, grad, exp_avg_sq * k.beta2);

  F second_moment = exp_avg_sq;
  if constexpr (amsgrad) {
    max_exp_avg_sq = max_or_nan(max_exp_avg_sq, exp_avg_sq);
    second_moment = max_exp_avg_sq;
  }
  const F denominator = add(sqrt(second_moment) / k.sqrt_correction2, k.eps);
  param = add(param, (k.neg_step_size * exp_avg) / denominator);
}

}  // namespace
}  // namespace fused_adam
