#include "coefficients.hpp"

#include <cmath>

#include "float_mode.hpp"

namespace fused_adam {
namespace {

// An unevaluated sum, |low| <= ulp(high) / 2: about 106 bits.
struct DoubleDouble {
  double high, low;
};

DoubleDouble split(double x) {
  const double scaled = 134217729.0 * x;  // 2**27 + 1: two halves of 26 bits
  const double high = scaled - (scaled - x);
  return {high, x - high};
}

DoubleDouble operator*(DoubleDouble a, DoubleDouble b) {
  const double product = a.high * b.high;
  const DoubleDouble x = split(a.high), y = split(b.high);
  double error = ((x.high * y.high - product) + x.high * y.low + x.low * y.high) + x.low * y.low;
  error += a.high * b.low + a.low * b.high;
  const double high = product + error;
  return {high, error - (high - product)};
}

// The C library's pow depends on the library and on the CPU: glibc's differs between its FMA and
// its plain variant in 67 of beta**1 ... beta**100000 for beta = 0.999. Squaring in double-double
// is correctly rounded but for about one case in 2**30, so 1 - beta**t is mostly what
// PyTorch gets from glibc too: equal for all t <= 100000 at beta = 0.9 and 0.999, all but 6 at
// 0.9999, and in 27 of 100,000 cases another for betas drawn from 0.99 to 0.999 (python -m
// benchmarks.powers).
//
// Both betas in one loop: each is one chain of operations that wait for each other, and together
// they take hardly longer than one. That is 60 ns of a step of 700.
struct Powers {
  double beta1, beta2;
};

Powers powers(double beta1, double beta2, int64_t exponent) {
  DoubleDouble result1 = {1.0, 0.0}, square1 = {beta1, 0.0};
  DoubleDouble result2 = {1.0, 0.0}, square2 = {beta2, 0.0};
  while (true) {
    if (exponent & 1) {
      result1 = result1 * square1;
      result2 = result2 * square2;
    }
    exponent >>= 1;
    if (exponent == 0) return {result1.high, result2.high};
    square1 = square1 * square1;
    square2 = square2 * square2;
  }
}

// PyTorch's lerp computes start + weight * (end - start) from the nearer of the two ends, as the
// narrowed weight says; from the far one, with weight - 1 instead, which is exact here.
template <class T>
bool lerp_from_end(T& weight) {
  if (weight < T(0.5)) return false;
  weight -= T(1);
  return true;
}

template <class T>
StepCoefficients<T> narrow(const Coefficients<double>& k, double ema_weight) {
  StepCoefficients<T> out;
  out.k.grad_sign = static_cast<T>(k.grad_sign);
  out.k.l2_decay = static_cast<T>(k.l2_decay);
  out.k.param_decay = static_cast<T>(k.param_decay);
  out.k.lerp_weight = static_cast<T>(k.lerp_weight);
  out.k.one_minus_beta2 = static_cast<T>(k.one_minus_beta2);
  out.k.beta2 = static_cast<T>(k.beta2);
  out.k.neg_sqrt_correction2 = static_cast<T>(k.neg_sqrt_correction2);
  out.k.reciprocal_sqrt_correction2 = T(1) / -out.k.neg_sqrt_correction2;
  out.k.eps_root = static_cast<T>(k.eps_root);
  out.k.eps = static_cast<T>(k.eps);
  out.k.neg_step_size = static_cast<T>(k.neg_step_size);
  out.eps_in_root = k.eps_root != 0.0;
  out.ema_weight = static_cast<T>(ema_weight);
  out.lerp_from_grad = lerp_from_end(out.k.lerp_weight);
  out.ema_from_param = lerp_from_end(out.ema_weight);
  return out;
}

// Both a product with the reciprocal of a power of two and a division by it round the same number.
template <class T>
GradCoefficients<T> narrow(double grad_scale, double clip, double bound) {
  const T scale = static_cast<T>(grad_scale), reciprocal = T(1) / scale;
  int exponent;
  const bool divides = std::frexp(scale, &exponent) != T(0.5);
  return {divides ? scale : reciprocal, static_cast<T>(clip), static_cast<T>(bound), divides};
}

}  // namespace

GradCoefficientSet grad_coefficients(double grad_scale, double clip, double bound) {
  const DefaultFloatMode mode;
  return {narrow<float>(grad_scale, clip, bound), narrow<double>(grad_scale, clip, bound)};
}

double clip_coefficient(double max_norm, double norm) {
  const DefaultFloatMode mode;
  if (std::isinf(max_norm)) return 1.0;  // of a norm that is no number, too
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

CoefficientSet coefficients(const HyperParameters& hyper, int64_t step) {
  const DefaultFloatMode mode;
  const bool decoupled = hyper.decoupled_weight_decay;
  const Powers power =
      hyper.bias_correction ? powers(hyper.beta1, hyper.beta2, step) : Powers{0.0, 0.0};
  const double correction1 = 1.0 - power.beta1, correction2 = 1.0 - power.beta2;
  Coefficients<double> k;
  k.grad_sign = hyper.maximize ? -0.0 : 0.0;
  k.l2_decay = decoupled ? 0.0 : hyper.weight_decay;
  // Rounded once: the compiler of PyTorch makes one fused operation of 1 - lr * weight_decay.
  k.param_decay = decoupled ? std::fma(-hyper.lr, hyper.weight_decay, 1.0) : 1.0;
  k.lerp_weight = 1.0 - hyper.beta1;
  k.one_minus_beta2 = 1.0 - hyper.beta2;
  k.beta2 = hyper.beta2;
  k.neg_sqrt_correction2 = -std::sqrt(correction2);
  k.eps_root = k.eps = 0.0;
  switch (hyper.eps_mode) {
    case HyperParameters::kOutside:
      k.eps = hyper.eps;
      break;
    case HyperParameters::kHat:
      k.eps = hyper.eps / std::sqrt(correction2);
      break;
    case HyperParameters::kRoot:
      k.eps_root = hyper.eps * correction2;
      break;
  }
  k.neg_step_size = -hyper.lr / correction1;
  const double ema_weight = hyper.keeps_ema() ? 1.0 - hyper.ema_decay : 0.0;
  return {narrow<float>(k, ema_weight), narrow<double>(k, ema_weight)};
}

}  // namespace fused_adam
