// F32x16 and F64x8: the operations of scalar.hpp on 512-bit registers (AVX-512 F, BW, DQ and VL).
#pragma once

#include <immintrin.h>
#include <stdint.h>

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
  // As in F64x8::load, here and below: a mask that masks nothing.
  static constexpr __mmask16 kAll = 0xFFFF;
  static __m256i load16(const uint16_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static F32x16 load_float16(const uint16_t* p) { return {_mm512_maskz_cvtph_ps(kAll, load16(p))}; }
  static F32x16 load_bfloat16(const uint16_t* p) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAll, load16(p));
    return {_mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, wide, 16))};
  }
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

inline void store_float16(uint16_t* p, F32x16 a) {
  const __m256i coded = _mm512_maskz_cvtps_ph(F32x16::kAll, a.v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), coded);
}
// The conversion of AVX512_BF16 flushes subnormal numbers: in integers, as everywhere.
inline void store_bfloat16(uint16_t* p, F32x16 a) {
  constexpr __mmask16 all = F32x16::kAll;
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i upper = _mm512_maskz_srli_epi32(all, bits, 16);
  const __m512i even = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(even, _mm512_set1_epi32(0x7FFF));
  const __m512i nearest = _mm512_maskz_srli_epi32(all, _mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i coded = _mm512_mask_or_epi32(nearest, nan, upper, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(all, coded));
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
