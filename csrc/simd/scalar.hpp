// F32x1 and F64x1: the definition of every operation, one value at a time.
//
// The other files of this folder give the same operations for wider vectors; for every lane their
// result must be what stands here. All of them are correctly rounded in IEEE 754, which is why all
// ISAs agree bit for bit. There is no operator+ or operator-: a sum that follows a product has to
// be written as fma, and a sum that stands alone as add or sub, so that no reader has to guess.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace fused_adam {
namespace {

struct F32x1 {
  using Scalar = float;
  static constexpr int width = 1;
  float v;

  static F32x1 broadcast(float x) { return {x}; }
  static F32x1 load(const float* p) { return {*p}; }
  static F32x1 load_n(const float* p, int) { return {*p}; }
  static F32x1 load_float16(const uint16_t* p);
  static F32x1 load_bfloat16(const uint16_t* p);
  static F32x1 load_e4m3(const uint8_t* p, uint32_t base);
  static F32x1 load_e5m3(const uint8_t* p, uint32_t base);
  using Word = uint32_t;  // one number in all lanes
  static constexpr int codes_at_once = 1;
  static void store_e4m3(uint8_t*, const float*, uint32_t base, const uint32_t*, uint32_t);
  static void store_e5m3(uint8_t*, const float*, uint32_t base, const uint32_t*, uint32_t);
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

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// A 16-bit number has as many bits of a float32, which has all of them.
inline F32x1 F32x1::load_bfloat16(const uint16_t* p) {
  return {float_of(static_cast<uint32_t>(*p) << 16)};
}
inline F32x1 F32x1::load_float16(const uint16_t* p) {
  const uint32_t sign = (*p & 0x8000u) << 16, exponent = *p >> 10 & 31u, fraction = *p & 0x3FFu;
  if (exponent == 0) return {::copysignf(static_cast<float>(fraction) * 0x1p-24f, float_of(sign))};
  const uint32_t quiet = exponent == 31 && fraction != 0 ? 0x400000u : 0;
  return {float_of(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13 | quiet)};
}
// To the nearest, of two equally near ones to the one with an even last bit; a NaN is quiet.
inline void store_bfloat16(uint16_t* p, F32x1 a) {
  const uint32_t bits = bits_of(a.v);
  const uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  *p = static_cast<uint16_t>(a.v != a.v ? bits >> 16 | 0x40 : nearest);
}
inline void store_float16(uint16_t* p, F32x1 a) {
  const uint32_t bits = bits_of(a.v), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  uint32_t coded;
  if (size > 0x7F800000) {
    coded = 0x7E00 | (size >> 13 & 0x3FF);
  } else if (size >= 0x477FF000) {  // 65520: from here on infinity is as near
    coded = 0x7C00;
  } else if (size >= 0x38800000) {
    coded = (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13;
  } else {  // 0.5 has the last bit of subnormal numbers, 2**-24
    coded = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
  }
  *p = static_cast<uint16_t>(sign | coded);
}

// Dithered: what is added to the bits that are cut off is *net ^ word, of as many bits.
inline void store_bfloat16(uint16_t* p, F32x1 a, const uint32_t* net, uint32_t word) {
  const uint32_t bits = bits_of(a.v);
  *p = static_cast<uint16_t>(a.v != a.v ? bits >> 16 | 0x7FFF : (bits + (*net ^ word)) >> 16);
}
inline void store_float16(uint16_t* p, F32x1 a, const uint32_t* net, uint32_t word) {
  const uint32_t bits = bits_of(a.v), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  const uint32_t added = *net ^ word;
  uint32_t coded;
  if (size >= 0x38800000) {
    coded = (size + (added >> 3) - 0x38000000) >> 13;
    coded = size > 0x7F800000 ? 0x7E00 : coded > 0x7C00 ? 0x7C00 : coded;
  } else {  // in units of the last bit of subnormal numbers, cut off
    const float units = float_of(size) * 0x1p24f, more = static_cast<float>(added) * 0x1p-16f;
    const auto whole =
        static_cast<uint32_t>(units);  // apart, or their sum would be rounded up to 1
    coded = whole + static_cast<uint32_t>((units - static_cast<float>(whole)) + more);
  }
  *p = static_cast<uint16_t>(sign | coded);
}

inline bool any_nan(F32x1 a, F32x1 b) { return a.v != a.v || b.v != b.v; }
// Of what is no NaN.
inline void store_bfloat16_number(uint16_t* p, F32x1 a, const uint32_t* net, uint32_t word) {
  *p = static_cast<uint16_t>((bits_of(a.v) + (*net ^ word)) >> 16);
}

// The codings of 8 bits: see convert_kernel.hpp. Stored from codes_at_once numbers, none of which
// is infinite or NaN, and for E5M3 none negative, and which the base is chosen for.
inline F32x1 F32x1::load_e4m3(const uint8_t* p, uint32_t base) {
  const uint32_t size = *p & 0x7Fu, sign = (*p & 0x80u) << 24;
  return {float_of(sign | (size == 0 ? 0 : (size << 20) + base))};
}
inline F32x1 F32x1::load_e5m3(const uint8_t* p, uint32_t base) {
  return {float_of((static_cast<uint32_t>(*p) << 20) + base)};
}
inline uint32_t code_of(uint32_t size, uint32_t base, uint32_t added) {
  const auto above = static_cast<int32_t>(size + added - base);
  return above < 0 ? 0 : static_cast<uint32_t>(above) >> 20;
}
inline void F32x1::store_e4m3(uint8_t* p, const float* x, uint32_t base, const uint32_t* net,
                              uint32_t word) {
  const uint32_t bits = bits_of(*x), code = code_of(bits & 0x7FFFFFFF, base, *net ^ word);
  *p = static_cast<uint8_t>(code | (bits >> 24 & 0x80));
}
inline void F32x1::store_e5m3(uint8_t* p, const float* x, uint32_t base, const uint32_t* net,
                              uint32_t word) {
  *p = static_cast<uint8_t>(code_of(bits_of(*x), base, *net ^ word));
}
// Of bits as unsigned numbers: the larger ones; the largest of all lanes. And without the sign.
inline F32x1 max_bits(F32x1 a, F32x1 b) { return bits_of(a.v) > bits_of(b.v) ? a : b; }
inline uint32_t largest_bits(F32x1 a) { return bits_of(a.v); }
inline F32x1 magnitude(F32x1 a) { return {float_of(bits_of(a.v) & 0x7FFFFFFF)}; }

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
