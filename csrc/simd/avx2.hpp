// F32x8 and F64x4: the operations of scalar.hpp on 256-bit registers (AVX2 and FMA).
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace fused_adam {
namespace {

// load_n and store_n touch only the first n elements: masked lanes cannot fault, so a tail may end
// at the last byte of a page. The window of n set lanes is read from the middle of these tables.
alignas(64) const int32_t kLanes32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(64) const int64_t kLanes64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};

struct F32x8 {
  using Scalar = float;
  static constexpr int width = 8;
  __m256 v;

  static __m256i first(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes32 + 8 - n));
  }
  static F32x8 broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static F32x8 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static F32x8 load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
  static __m128i load16(const uint16_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static F32x8 load_float16(const uint16_t* p) { return {_mm256_cvtph_ps(load16(p))}; }
  static F32x8 load_bfloat16(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16))};
  }
};

inline void store(float* p, F32x8 a) { _mm256_storeu_ps(p, a.v); }
inline void store_n(float* p, F32x8 a, int n) { _mm256_maskstore_ps(p, F32x8::first(n), a.v); }
inline F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32x8 add(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32x8 sub(F32x8 a, F32x8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x8 sqrt(F32x8 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F32x8 flip_sign(F32x8 a, F32x8 b) { return {_mm256_xor_ps(a.v, b.v)}; }
inline F32x8 max(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
// VMAXPS loses a NaN in a; or with the lanes that have one, which are all ones, makes it NaN again.
inline F32x8 max_or_nan(F32x8 a, F32x8 b) {
  return {_mm256_or_ps(_mm256_max_ps(a.v, b.v), _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}

inline void store_float16(uint16_t* p, F32x8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_bfloat16(uint16_t* p, F32x8 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF));
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i coded = _mm256_blendv_epi8(nearest, quiet, nan);
  // Packed within each half of the register; then the first quarter of each, side by side.
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(coded, coded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

struct F64x4 {
  using Scalar = double;
  static constexpr int width = 4;
  __m256d v;

  static __m256i first(int n) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes64 + 4 - n));
  }
  static F64x4 broadcast(double x) { return {_mm256_set1_pd(x)}; }
  static F64x4 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static F64x4 load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static F64x4 load_n(const double* p, int n) { return {_mm256_maskload_pd(p, first(n))}; }
};

inline void store(double* p, F64x4 a) { _mm256_storeu_pd(p, a.v); }
inline void store_n(double* p, F64x4 a, int n) { _mm256_maskstore_pd(p, F64x4::first(n), a.v); }
inline F64x4 operator*(F64x4 a, F64x4 b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline F64x4 operator/(F64x4 a, F64x4 b) { return {_mm256_div_pd(a.v, b.v)}; }
inline F64x4 add(F64x4 a, F64x4 b) { return {_mm256_add_pd(a.v, b.v)}; }
inline F64x4 sub(F64x4 a, F64x4 b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline F64x4 fma(F64x4 a, F64x4 b, F64x4 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline F64x4 sqrt(F64x4 a) { return {_mm256_sqrt_pd(a.v)}; }
inline F64x4 flip_sign(F64x4 a, F64x4 b) { return {_mm256_xor_pd(a.v, b.v)}; }
inline F64x4 max(F64x4 a, F64x4 b) { return {_mm256_max_pd(a.v, b.v)}; }
inline F64x4 max_or_nan(F64x4 a, F64x4 b) {
  return {_mm256_or_pd(_mm256_max_pd(a.v, b.v), _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q))};
}

}  // namespace
}  // namespace fused_adam
