// Hyper-parameters and a step count become the few numbers that a kernel needs.
#pragma once

#include <stdint.h>

#if defined(__FAST_MATH__)
#error "fused-adam promises bits, which -ffast-math and its kin do not keep"
#endif

namespace fused_adam {

// The options of one parameter group and their defaults. Names and meaning are PyTorch's, where
// PyTorch has them. bindings/options.cpp is the table of what may be asked for.
struct HyperParameters {
  static constexpr double kNone = -1.0;
  // Where eps stands: sqrt(v_hat) + eps; (sqrt(v) + eps) corrected; sqrt(v_hat + eps).
  enum EpsMode { kOutside, kHat, kRoot };
  // What the moments are stored as: what they are computed in, or coded.
  enum StateDType { kFull, kStateBFloat16, kStateFloat8 };
  static constexpr int kStateDTypes = kStateFloat8 + 1;

  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  bool amsgrad = false;
  bool maximize = false;
  bool decoupled_weight_decay = false;
  double ema_decay = kNone;
  double max_norm = kNone;
  double clip_value = kNone;
  bool skip_nonfinite = false;
  EpsMode eps_mode = kOutside;
  bool bias_correction = true;
  bool master_weights = false;
  bool stochastic_rounding = false;
  int64_t seed = 0;
  StateDType state_dtype = kFull;

  constexpr bool keeps_ema() const { return ema_decay >= 0.0; }
  constexpr bool clips_norm() const { return max_norm >= 0.0; }
  constexpr bool clips_value() const { return clip_value >= 0.0; }
  constexpr bool measures() const { return clips_norm() || skip_nonfinite; }
};

// What adam_rule.hpp calls k. T is a float, a double, or a vector of either.
template <class T>
struct Coefficients {
  T grad_sign;    // -0 to maximize, else +0: only its sign counts
  T l2_decay;     // weight_decay of the L2 form
  T param_decay;  // 1 - lr * weight_decay when decoupled, else 1 (an exact no-op)
  T lerp_weight;  // of grad - exp_avg: 1 - beta1, or -beta1 when lerp_from_grad
  T one_minus_beta2;
  T beta2;
  T neg_sqrt_correction2;         // -sqrt(1 - beta2**step)
  T reciprocal_sqrt_correction2;  // 1 / sqrt(1 - beta2**step), of the narrowed root
  T eps_root;                     // eps * (1 - beta2**step), if it stands inside the root
  T eps;                          // outside the root, after the bias correction; else 0
  T neg_step_size;                // -lr / (1 - beta1**step)
};

template <class T>
struct StepCoefficients {
  Coefficients<T> k;
  bool eps_in_root;
  bool lerp_from_grad;  // 1 - beta1 >= 0.5: the average is nearer to grad than to exp_avg
  T ema_weight;         // of param - ema: 1 - ema_decay, or -ema_decay when ema_from_param
  bool ema_from_param;  // 1 - ema_decay >= 0.5, likewise
};

// The coefficients of one group at one step, for arrays of either dtype.
struct CoefficientSet {
  StepCoefficients<float> f32;
  StepCoefficients<double> f64;
};

// What a gradient goes through before the rule: clamp(grad / scale * clip, -bound, bound).
template <class T>
struct GradCoefficients {
  T scale;       // the divisor; or its reciprocal, where that is exact and a product the same
  T clip;        // 1: none
  T bound;       // infinity: none
  bool divides;  // by the scale

  bool do_nothing() const { return !divides && scale == 1 && clip == 1 && bound > kLargest; }

 private:
  static constexpr T kLargest = sizeof(T) == 4 ? T(0x1.fffffep+127) : T(0x1.fffffffffffffp+1023);
};

struct GradCoefficientSet {
  GradCoefficients<float> f32;
  GradCoefficients<double> f64;
};

// grad_scale: a normal float32 number > 0. clip: of the norm; what is NaN makes every gradient NaN.
// bound: >= 0.
GradCoefficientSet grad_coefficients(double grad_scale, double clip, double bound);

// By which gradients of this norm are multiplied, as in torch.nn.utils.clip_grad_norm_:
// max_norm / (norm + 1e-6) where that is below 1, or NaN; else 1, and for an infinite max_norm.
double clip_coefficient(double max_norm, double norm);

// Computed in double and narrowed once, whatever the rounding mode of the caller. step counts
// from 1.
CoefficientSet coefficients(const HyperParameters& hyper, int64_t step);

}  // namespace fused_adam
