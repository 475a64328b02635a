// F32x1 and F64x1: the definition of every operation, one value at a time.
//
// The other files of this folder give the same operations for wider vectors; for every lane their
// result must be what stands here. All of them are correctly rounded in IEEE 754, which is why all
// ISAs agree bit for bit. There is no operator+ or operator-: a sum that follows a product has to
// be written as fma, and a sum that stands alone as add or sub, so that no reader has to guess.
#pragma once

#include <math.h>

namespace fused_adam {
namespace {

struct F32x1 {
  using Scalar = float;
  static constexpr int width = 1;
  float v;

  static F32x1 broadcast(float x) { return {x}; }
  static F32x1 load(const float* p) { return {*p}; }
  static F32x1 load_n(const float* p, int) { return {*p}; }
};

inline void store(float* p, F32x1 a) { *p = a.v; }
inline void store_n(float* p, F32x1 a, int) { *p = a.v; }
inline F32x1 operator*(F32x1 a, F32x1 b) { return {a.v * b.v}; }
inline F32x1 operator/(F32x1 a, F32x1 b) { return {a.v / b.v}; }
inline F32x1 add(F32x1 a, F32x1 b) { return {a.v + b.v}; }
inline F32x1 sub(F32x1 a, F32x1 b) { return {a.v - b.v}; }
inline F32x1 fma(F32x1 a, F32x1 b, F32x1 c) { return {::fmaf(a.v, b.v, c.v)}; }
inline F32x1 sqrt(F32x1 a) { return {::sqrtf(a.v)}; }
// -a where b has a sign, else a. b is a zero, +0 or -0.
inline F32x1 flip_sign(F32x1 a, F32x1 b) { return {a.v * ::copysignf(1.0f, b.v)}; }
// The larger of the two; b where they are equal or either is NaN.
inline F32x1 max(F32x1 a, F32x1 b) { return a.v > b.v ? a : b; }
// The larger of the two; b where they are equal; NaN where either is.
inline F32x1 max_or_nan(F32x1 a, F32x1 b) { return a.v > b.v || a.v != a.v ? a : b; }

struct F64x1 {
  using Scalar = double;
  static constexpr int width = 1;
  double v;

  static F64x1 broadcast(double x) { return {x}; }
  static F64x1 load(const double* p) { return {*p}; }
  static F64x1 load(const float* p) { return {*p}; }
  static F64x1 load_n(const double* p, int) { return {*p}; }
};

inline void store(double* p, F64x1 a) { *p = a.v; }
inline void store_n(double* p, F64x1 a, int) { *p = a.v; }
inline F64x1 operator*(F64x1 a, F64x1 b) { return {a.v * b.v}; }
inline F64x1 operator/(F64x1 a, F64x1 b) { return {a.v / b.v}; }
inline F64x1 add(F64x1 a, F64x1 b) { return {a.v + b.v}; }
inline F64x1 sub(F64x1 a, F64x1 b) { return {a.v - b.v}; }
inline F64x1 fma(F64x1 a, F64x1 b, F64x1 c) { return {::fma(a.v, b.v, c.v)}; }
inline F64x1 sqrt(F64x1 a) { return {::sqrt(a.v)}; }
inline F64x1 flip_sign(F64x1 a, F64x1 b) { return {a.v * ::copysign(1.0, b.v)}; }
inline F64x1 max(F64x1 a, F64x1 b) { return a.v > b.v ? a : b; }
inline F64x1 max_or_nan(F64x1 a, F64x1 b) { return a.v > b.v || a.v != a.v ? a : b; }

}  // namespace
}  // namespace fused_adam
