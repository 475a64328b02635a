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

  // One number in all lanes.
  struct Word {
    __m512i v;
    explicit Word(uint32_t x = 0) : v(_mm512_set1_epi32(static_cast<int32_t>(x))) {}
  };
  static __m512i bits(const float* p) { return _mm512_loadu_si512(p); }
  static __m512i bits(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static __m128i codes(const uint8_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static F32x16 load_e4m3(const uint8_t* p, Word base) {
    const __m512i code = _mm512_maskz_cvtepi8_epi32(kAll, codes(p));  // its sign in each upper bit
    const __m512i above =
        _mm512_and_si512(_mm512_maskz_slli_epi32(kAll, code, 20), _mm512_set1_epi32(0x07F00000));
    const __mmask16 not_zero = _mm512_test_epi32_mask(above, above);
    const __m512i size = _mm512_maskz_add_epi32(not_zero, above, base.v);
    constexpr int kFirstOrBothOthers = 0xF8;
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(size, code, sign, kFirstOrBothOthers))};
  }
  static F32x16 load_e5m3(const uint8_t* p, Word base) {
    const __m512i code = _mm512_maskz_cvtepu8_epi32(kAll, codes(p));
    const __m512i above = _mm512_maskz_slli_epi32(kAll, code, 20);
    return {_mm512_castsi512_ps(_mm512_add_epi32(above, base.v))};
  }
  static constexpr int codes_at_once = width;
  static __m512i code_of(__m512i size, Word base, const uint32_t* net, Word word) {
    const __m512i added = _mm512_xor_si512(bits(net), word.v);
    const __m512i above = _mm512_sub_epi32(_mm512_add_epi32(size, added), base.v);
    return _mm512_maskz_srai_epi32(kAll,
                                   _mm512_maskz_max_epi32(kAll, above, _mm512_setzero_si512()), 20);
  }
  static void store_codes(uint8_t* p, __m512i code) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(kAll, code));
  }
  static void store_e4m3(uint8_t* p, const float* x, Word base, const uint32_t* net, Word word) {
    const __m512i signed_bits = bits(x);
    const __m512i size = _mm512_and_si512(signed_bits, _mm512_set1_epi32(INT32_MAX));
    const __m512i code = code_of(size, base, net, word);
    constexpr int kFirstOrBothOthers = 0xF8;
    const __m512i shifted = _mm512_maskz_srli_epi32(kAll, signed_bits, 24);
    store_codes(
        p, _mm512_ternarylogic_epi32(code, shifted, _mm512_set1_epi32(0x80), kFirstOrBothOthers));
  }
  static void store_e5m3(uint8_t* p, const float* x, Word base, const uint32_t* net, Word word) {
    store_codes(p, code_of(bits(x), base, net, word));
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

inline F32x16 max_bits(F32x16 a, F32x16 b) {
  const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
  return {_mm512_castsi512_ps(_mm512_maskz_max_epu32(F32x16::kAll, x, y))};
}
inline F32x16 magnitude(F32x16 a) {
  const __m512i all_but_sign = _mm512_set1_epi32(INT32_MAX);
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), all_but_sign))};
}
inline uint32_t largest_bits(F32x16 a) {
  const __m512i all = _mm512_castps_si512(a.v);
  const __m256i eight = _mm256_max_epu32(_mm512_maskz_extracti32x8_epi32(0xFF, all, 0),
                                         _mm512_maskz_extracti32x8_epi32(0xFF, all, 1));
  const __m128i four =
      _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
  const __m128i one = _mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(one));
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
inline bool any_nan(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q) != 0; }
inline void store_bfloat16_number(uint16_t* p, F32x16 a, const uint32_t* net, F32x16::Word word) {
  constexpr __mmask16 all = F32x16::kAll;
  const __m512i added = _mm512_xor_si512(F32x16::bits(net), word.v);
  const __m512i sum = _mm512_add_epi32(_mm512_castps_si512(a.v), added);
  const __m256i coded = _mm512_maskz_cvtepi32_epi16(all, _mm512_maskz_srli_epi32(all, sum, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), coded);
}
inline void store_bfloat16(uint16_t* p, F32x16 a, const uint32_t* net, F32x16::Word word) {
  constexpr __mmask16 all = F32x16::kAll;
  const __m512i added = _mm512_xor_si512(F32x16::bits(net), word.v);
  const __m512i sum = _mm512_add_epi32(_mm512_castps_si512(a.v), added);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i coded =
      _mm512_mask_mov_epi32(_mm512_maskz_srli_epi32(all, sum, 16), nan, _mm512_set1_epi32(0x7FFF));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(all, coded));
}
inline void store_float16(uint16_t* p, F32x16 a, const uint32_t* net, F32x16::Word word) {
  constexpr __mmask16 all = F32x16::kAll;
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i size = _mm512_and_si512(bits, _mm512_set1_epi32(INT32_MAX));
  const __m512i added = _mm512_xor_si512(F32x16::bits(net), word.v);
  const __m512i sum = _mm512_add_epi32(size, _mm512_maskz_srli_epi32(all, added, 3));
  const __m512i normal =
      _mm512_maskz_srli_epi32(all, _mm512_sub_epi32(sum, _mm512_set1_epi32(0x38000000)), 13);
  const __m512i finite = _mm512_maskz_min_epu32(all, normal, _mm512_set1_epi32(0x7C00));
  const __m512 units = _mm512_mul_ps(_mm512_castsi512_ps(size), _mm512_set1_ps(0x1p24f));
  const __m512 more = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(all, added), _mm512_set1_ps(0x1p-16f));
  const __mmask16 small = _mm512_cmp_epu32_mask(size, _mm512_set1_epi32(0x38800000), _MM_CMPINT_LT);
  const __m512i whole = _mm512_maskz_cvttps_epi32(small, units);
  const __m512 rest = _mm512_sub_ps(units, _mm512_maskz_cvtepi32_ps(all, whole));
  const __m512i carry = _mm512_maskz_cvttps_epi32(small, _mm512_add_ps(rest, more));
  const __m512i number = _mm512_mask_add_epi32(finite, small, whole, carry);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i coded = _mm512_mask_mov_epi32(number, nan, _mm512_set1_epi32(0x7E00));
  const __m512i sign =
      _mm512_and_si512(_mm512_maskz_srli_epi32(all, bits, 16), _mm512_set1_epi32(0x8000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtepi32_epi16(all, _mm512_or_si512(coded, sign)));
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
