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

  // One number in all lanes.
  struct Word {
    __m256i v;
    explicit Word(uint32_t x = 0) : v(_mm256_set1_epi32(static_cast<int32_t>(x))) {}
  };
  static __m256i bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m128i codes(const uint8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  }
  static F32x8 load_e4m3(const uint8_t* p, Word base) {
    const __m256i code = _mm256_cvtepi8_epi32(codes(p));  // its sign in each upper bit
    const __m256i above =
        _mm256_and_si256(_mm256_slli_epi32(code, 20), _mm256_set1_epi32(0x07F00000));
    const __m256i zero = _mm256_cmpeq_epi32(above, _mm256_setzero_si256());
    const __m256i sum = _mm256_add_epi32(above, base.v);
    const __m256i sign = _mm256_and_si256(code, _mm256_set1_epi32(INT32_MIN));
    return {_mm256_castsi256_ps(_mm256_or_si256(_mm256_andnot_si256(zero, sum), sign))};
  }
  static F32x8 load_e5m3(const uint8_t* p, Word base) {
    const __m256i above = _mm256_slli_epi32(_mm256_cvtepu8_epi32(codes(p)), 20);
    return {_mm256_castsi256_ps(_mm256_add_epi32(above, base.v))};
  }
  static constexpr int codes_at_once = 32;
  // Before it is packed, which makes 0 of what is negative.
  static __m256i code_of(__m256i size, Word base, const uint32_t* net, Word word) {
    const __m256i added = _mm256_xor_si256(bits(net), word.v);
    const __m256i above = _mm256_sub_epi32(_mm256_add_epi32(size, added), base.v);
    return _mm256_srai_epi32(above, 20);
  }
  static __m256i size_of(__m256i bits) {
    return _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MAX));
  }
  // Packed within each half of the register; then four bytes of each in turn.
  static void store_codes(uint8_t* p, __m256i codes) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(codes, order));
  }
  static void store_e4m3(uint8_t* p, const float* x, Word base, const uint32_t* net, Word word) {
    const __m256i a = bits(x), b = bits(x + 8), c = bits(x + 16), d = bits(x + 24);
    const __m256i ab = _mm256_packus_epi32(code_of(size_of(a), base, net, word),
                                           code_of(size_of(b), base, net + 8, word));
    const __m256i cd = _mm256_packus_epi32(code_of(size_of(c), base, net + 16, word),
                                           code_of(size_of(d), base, net + 24, word));
    // What has a sign is a negative number, and stays one where it is packed as such.
    const __m256i signs = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    const __m256i sign = _mm256_and_si256(signs, _mm256_set1_epi8(INT8_MIN));
    store_codes(p, _mm256_or_si256(_mm256_packus_epi16(ab, cd), sign));
  }
  static void store_e5m3(uint8_t* p, const float* x, Word base, const uint32_t* net, Word word) {
    const auto code = [&](int i) { return code_of(bits(x + i), base, net + i, word); };
    const __m256i ab = _mm256_packus_epi32(code(0), code(8));
    const __m256i cd = _mm256_packus_epi32(code(16), code(24));
    store_codes(p, _mm256_packus_epi16(ab, cd));
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

inline F32x8 max_bits(F32x8 a, F32x8 b) {
  const __m256i larger = _mm256_max_epu32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v));
  return {_mm256_castsi256_ps(larger)};
}
inline F32x8 magnitude(F32x8 a) {
  return {_mm256_castsi256_ps(F32x8::size_of(_mm256_castps_si256(a.v)))};
}
inline uint32_t largest_bits(F32x8 a) {
  const __m256i all = _mm256_castps_si256(a.v);
  const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  const __m128i two = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4E));
  const __m128i one = _mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(one));
}

inline void store_float16(uint16_t* p, F32x8 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// The lower halves. Packed within each half of the register; then the first quarter of each, side
// by side.
inline void store16(uint16_t* p, __m256i coded) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(coded, coded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_bfloat16(uint16_t* p, F32x8 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF));
  const __m256i nearest = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  store16(p, _mm256_blendv_epi8(nearest, quiet, nan));
}
inline bool any_nan(F32x8 a, F32x8 b) {
  const __m256 nan = _mm256_cmp_ps(a.v, b.v, _CMP_UNORD_Q);
  return _mm256_testz_ps(nan, nan) == 0;
}
inline void store_bfloat16_number(uint16_t* p, F32x8 a, const uint32_t* net, F32x8::Word word) {
  const __m256i added = _mm256_xor_si256(F32x8::bits(net), word.v);
  store16(p, _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(a.v), added), 16));
}
inline void store_bfloat16(uint16_t* p, F32x8 a, const uint32_t* net, F32x8::Word word) {
  const __m256i added = _mm256_xor_si256(F32x8::bits(net), word.v);
  const __m256i sum = _mm256_add_epi32(_mm256_castps_si256(a.v), added);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  store16(p, _mm256_or_si256(_mm256_srli_epi32(sum, 16), _mm256_srli_epi32(nan, 17)));
}
inline void store_float16(uint16_t* p, F32x8 a, const uint32_t* net, F32x8::Word word) {
  const __m256i bits = _mm256_castps_si256(a.v), size = F32x8::size_of(bits);
  const __m256i added = _mm256_xor_si256(F32x8::bits(net), word.v);
  const __m256i sum = _mm256_add_epi32(size, _mm256_srli_epi32(added, 3));
  const __m256i normal =
      _mm256_srli_epi32(_mm256_sub_epi32(sum, _mm256_set1_epi32(0x38000000)), 13);
  const __m256i finite = _mm256_min_epu32(normal, _mm256_set1_epi32(0x7C00));
  const __m256 units = _mm256_mul_ps(_mm256_castsi256_ps(size), _mm256_set1_ps(0x1p24f));
  const __m256 more = _mm256_mul_ps(_mm256_cvtepi32_ps(added), _mm256_set1_ps(0x1p-16f));
  const __m256i whole = _mm256_cvttps_epi32(units);
  const __m256 rest = _mm256_sub_ps(units, _mm256_cvtepi32_ps(whole));
  const __m256i carry = _mm256_cvttps_epi32(_mm256_add_ps(rest, more));
  const __m256i subnormal = _mm256_add_epi32(whole, carry);
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x38800000), size);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i number = _mm256_blendv_epi8(finite, subnormal, small);
  const __m256i coded = _mm256_blendv_epi8(number, _mm256_set1_epi32(0x7E00), nan);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x8000));
  store16(p, _mm256_or_si256(coded, sign));
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
