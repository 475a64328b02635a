// F32x16 and F64x8: the operations of scalar.hpp on 512-bit registers (AVX-512 F, BW, DQ and VL).
#pragma once

#include <immintrin.h>

namespace fused_adam {
namespace {

struct F32x16 {
  using Scalar = float;
  static constexpr int width = 16;
  __m512 v;

  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32x16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
};

inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, F32x16 a, int n) { _mm512_mask_storeu_ps(p, F32x16::first(n), a.v); }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32x16 flip_sign(F32x16 a, F32x16 b) { return {_mm512_xor_ps(a.v, b.v)}; }
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
// VMAXPS loses a NaN in a: such lanes stay as they are.
inline F32x16 max_or_nan(F32x16 a, F32x16 b) {
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  return {_mm512_mask_max_ps(a.v, number, a.v, b.v)};
}

struct F64x8 {
  using Scalar = double;
  static constexpr int width = 8;
  __m512d v;

  static __mmask8 first(int n) { return static_cast<__mmask8>((1u << n) - 1); }
  static F64x8 broadcast(double x) { return {_mm512_set1_pd(x)}; }
  static F64x8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  // With a mask that masks nothing: of the form without, GCC 12 warns for what is in its own
  // header.
  static F64x8 load(const float* p) { return {_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p))}; }
  static F64x8 load_n(const double* p, int n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
};

inline void store(double* p, F64x8 a) { _mm512_storeu_pd(p, a.v); }
inline void store_n(double* p, F64x8 a, int n) { _mm512_mask_storeu_pd(p, F64x8::first(n), a.v); }
inline F64x8 operator*(F64x8 a, F64x8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline F64x8 operator/(F64x8 a, F64x8 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline F64x8 add(F64x8 a, F64x8 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline F64x8 sub(F64x8 a, F64x8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline F64x8 fma(F64x8 a, F64x8 b, F64x8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline F64x8 sqrt(F64x8 a) { return {_mm512_sqrt_pd(a.v)}; }
inline F64x8 flip_sign(F64x8 a, F64x8 b) { return {_mm512_xor_pd(a.v, b.v)}; }
inline F64x8 max(F64x8 a, F64x8 b) { return {_mm512_max_pd(a.v, b.v)}; }
inline F64x8 max_or_nan(F64x8 a, F64x8 b) {
  const __mmask8 number = _mm512_cmp_pd_mask(a.v, a.v, _CMP_ORD_Q);
  return {_mm512_mask_max_pd(a.v, number, a.v, b.v)};
}

}  // namespace
}  // namespace fused_adam
