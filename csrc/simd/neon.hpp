// F32x4 and F64x2: the operations of scalar.hpp on 128-bit registers (AArch64 Advanced SIMD).
#pragma once

#include <arm_neon.h>
#include <string.h>

namespace fused_adam {
namespace {

// NEON has no masked loads and stores: a tail goes through a buffer of one vector, so that only its
// own n elements are touched.
struct F32x4 {
  using Scalar = float;
  static constexpr int width = 4;
  float32x4_t v;

  static F32x4 broadcast(float x) { return {vdupq_n_f32(x)}; }
  static F32x4 load(const float* p) { return {vld1q_f32(p)}; }
  static F32x4 load_float16(const uint16_t* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))};
  }
  static F32x4 load_bfloat16(const uint16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
  }
  static F32x4 load_n(const float* p, int n) {
    float lanes[width] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
    return load(lanes);
  }

  // One number in all lanes.
  struct Word {
    uint32x4_t v;
    explicit Word(uint32_t x = 0) : v(vdupq_n_u32(x)) {}
  };
  static uint32x4_t bits(const float* p) { return vreinterpretq_u32_f32(vld1q_f32(p)); }
  static uint32x4_t size_of(uint32x4_t bits) { return vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF)); }
  static uint32x4_t codes(const uint8_t* p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
  }
  static F32x4 load_e4m3(const uint8_t* p, Word base) {
    const uint32x4_t code = codes(p);
    const uint32x4_t above = vandq_u32(vshlq_n_u32(code, 20), vdupq_n_u32(0x07F00000));
    const uint32x4_t size = vandq_u32(vaddq_u32(above, base.v), vtstq_u32(above, above));
    const uint32x4_t sign = vandq_u32(vshlq_n_u32(code, 24), vdupq_n_u32(0x80000000));
    return {vreinterpretq_f32_u32(vorrq_u32(size, sign))};
  }
  static F32x4 load_e5m3(const uint8_t* p, Word base) {
    const uint32x4_t above = vshlq_n_u32(codes(p), 20);
    return {vreinterpretq_f32_u32(vaddq_u32(above, base.v))};
  }
  static constexpr int codes_at_once = 16;
  // 0 where it would be negative.
  static uint16x4_t code_of(uint32x4_t size, Word base, const uint32_t* net, Word word) {
    const uint32x4_t added = veorq_u32(vld1q_u32(net), word.v);
    const uint32x4_t above = vsubq_u32(vaddq_u32(size, added), base.v);
    return vqmovun_s32(vshrq_n_s32(vreinterpretq_s32_u32(above), 20));
  }
  static uint8x16_t packed(uint16x4_t a, uint16x4_t b, uint16x4_t c, uint16x4_t d) {
    return vcombine_u8(vmovn_u16(vcombine_u16(a, b)), vmovn_u16(vcombine_u16(c, d)));
  }
  static void store_e4m3(uint8_t* p, const float* x, Word base, const uint32_t* net, Word word) {
    const auto code = [&](int i) { return code_of(size_of(bits(x + i)), base, net + i, word); };
    const auto upper = [&](int i) { return vshrn_n_u32(bits(x + i), 16); };
    const uint8x16_t signs = vcombine_u8(vshrn_n_u16(vcombine_u16(upper(0), upper(4)), 8),
                                         vshrn_n_u16(vcombine_u16(upper(8), upper(12)), 8));
    const uint8x16_t sizes = packed(code(0), code(4), code(8), code(12));
    vst1q_u8(p, vorrq_u8(sizes, vandq_u8(signs, vdupq_n_u8(0x80))));
  }
  static void store_e5m3(uint8_t* p, const float* x, Word base, const uint32_t* net, Word word) {
    const auto code = [&](int i) { return code_of(bits(x + i), base, net + i, word); };
    vst1q_u8(p, packed(code(0), code(4), code(8), code(12)));
  }
};

inline void store(float* p, F32x4 a) { vst1q_f32(p, a.v); }
inline void store_n(float* p, F32x4 a, int n) {
  float lanes[F32x4::width];
  store(lanes, a);
  memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
}
inline F32x4 operator*(F32x4 a, F32x4 b) { return {vmulq_f32(a.v, b.v)}; }
inline F32x4 operator/(F32x4 a, F32x4 b) { return {vdivq_f32(a.v, b.v)}; }
inline F32x4 add(F32x4 a, F32x4 b) { return {vaddq_f32(a.v, b.v)}; }
inline F32x4 sub(F32x4 a, F32x4 b) { return {vsubq_f32(a.v, b.v)}; }
inline F32x4 fma(F32x4 a, F32x4 b, F32x4 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline F32x4 sqrt(F32x4 a) { return {vsqrtq_f32(a.v)}; }
inline F32x4 flip_sign(F32x4 a, F32x4 b) {
  return {vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a.v), vreinterpretq_u32_f32(b.v)))};
}
// FMAX and FMAXNM order -0 below +0 and prefer another NaN, which x86 does not: compare and select.
inline F32x4 max(F32x4 a, F32x4 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline F32x4 max_or_nan(F32x4 a, F32x4 b) {
  const uint32x4_t number = vceqq_f32(a.v, a.v);
  return {vbslq_f32(vornq_u32(vcgtq_f32(a.v, b.v), number), a.v, b.v)};
}

inline F32x4 max_bits(F32x4 a, F32x4 b) {
  return {vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a.v), vreinterpretq_u32_f32(b.v)))};
}
inline F32x4 magnitude(F32x4 a) {
  return {vreinterpretq_f32_u32(F32x4::size_of(vreinterpretq_u32_f32(a.v)))};
}
inline uint32_t largest_bits(F32x4 a) { return vmaxvq_u32(vreinterpretq_u32_f32(a.v)); }

inline void store_float16(uint16_t* p, F32x4 a) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}
inline void store_bfloat16(uint16_t* p, F32x4 a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v);
  const uint32x4_t upper = vshrq_n_u32(bits, 16);
  const uint32x4_t half = vaddq_u32(vandq_u32(upper, vdupq_n_u32(1)), vdupq_n_u32(0x7FFF));
  const uint32x4_t nearest = vshrq_n_u32(vaddq_u32(bits, half), 16);
  const uint32x4_t quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
  vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(a.v, a.v), nearest, quiet)));
}
inline bool any_nan(F32x4 a, F32x4 b) {
  return vminvq_u32(vandq_u32(vceqq_f32(a.v, a.v), vceqq_f32(b.v, b.v))) == 0;
}
inline void store_bfloat16_number(uint16_t* p, F32x4 a, const uint32_t* net, F32x4::Word word) {
  const uint32x4_t added = veorq_u32(vld1q_u32(net), word.v);
  vst1_u16(p, vshrn_n_u32(vaddq_u32(vreinterpretq_u32_f32(a.v), added), 16));
}
inline void store_bfloat16(uint16_t* p, F32x4 a, const uint32_t* net, F32x4::Word word) {
  const uint32x4_t added = veorq_u32(vld1q_u32(net), word.v);
  const uint32x4_t coded = vshrq_n_u32(vaddq_u32(vreinterpretq_u32_f32(a.v), added), 16);
  vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(a.v, a.v), coded, vdupq_n_u32(0x7FFF))));
}
inline void store_float16(uint16_t* p, F32x4 a, const uint32_t* net, F32x4::Word word) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v), size = F32x4::size_of(bits);
  const uint32x4_t added = veorq_u32(vld1q_u32(net), word.v);
  const uint32x4_t sum = vaddq_u32(size, vshrq_n_u32(added, 3));
  const uint32x4_t normal = vshrq_n_u32(vsubq_u32(sum, vdupq_n_u32(0x38000000)), 13);
  const uint32x4_t finite = vminq_u32(normal, vdupq_n_u32(0x7C00));
  const float32x4_t units = vmulq_f32(vreinterpretq_f32_u32(size), vdupq_n_f32(0x1p24f));
  const float32x4_t more = vmulq_f32(vcvtq_f32_u32(added), vdupq_n_f32(0x1p-16f));
  const uint32x4_t whole = vcvtq_u32_f32(units);
  const float32x4_t rest = vsubq_f32(units, vcvtq_f32_u32(whole));
  const uint32x4_t subnormal = vaddq_u32(whole, vcvtq_u32_f32(vaddq_f32(rest, more)));
  const uint32x4_t number = vbslq_u32(vcltq_u32(size, vdupq_n_u32(0x38800000)), subnormal, finite);
  const uint32x4_t coded = vbslq_u32(vceqq_f32(a.v, a.v), number, vdupq_n_u32(0x7E00));
  vst1_u16(p, vorr_u16(vmovn_u32(coded),
                       vmovn_u32(vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(0x8000)))));
}

struct F64x2 {
  using Scalar = double;
  static constexpr int width = 2;
  float64x2_t v;

  static F64x2 broadcast(double x) { return {vdupq_n_f64(x)}; }
  static F64x2 load(const double* p) { return {vld1q_f64(p)}; }
  static F64x2 load(const float* p) { return {vcvt_f64_f32(vld1_f32(p))}; }
  static F64x2 load_n(const double* p, int n) {
    double lanes[width] = {};
    memcpy(lanes, p, static_cast<size_t>(n) * sizeof(double));
    return load(lanes);
  }
};

inline void store(double* p, F64x2 a) { vst1q_f64(p, a.v); }
inline void store_n(double* p, F64x2 a, int n) {
  double lanes[F64x2::width];
  store(lanes, a);
  memcpy(p, lanes, static_cast<size_t>(n) * sizeof(double));
}
inline F64x2 operator*(F64x2 a, F64x2 b) { return {vmulq_f64(a.v, b.v)}; }
inline F64x2 operator/(F64x2 a, F64x2 b) { return {vdivq_f64(a.v, b.v)}; }
inline F64x2 add(F64x2 a, F64x2 b) { return {vaddq_f64(a.v, b.v)}; }
inline F64x2 sub(F64x2 a, F64x2 b) { return {vsubq_f64(a.v, b.v)}; }
inline F64x2 fma(F64x2 a, F64x2 b, F64x2 c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
inline F64x2 sqrt(F64x2 a) { return {vsqrtq_f64(a.v)}; }
inline F64x2 flip_sign(F64x2 a, F64x2 b) {
  return {vreinterpretq_f64_u64(veorq_u64(vreinterpretq_u64_f64(a.v), vreinterpretq_u64_f64(b.v)))};
}
inline F64x2 max(F64x2 a, F64x2 b) { return {vbslq_f64(vcgtq_f64(a.v, b.v), a.v, b.v)}; }
inline F64x2 max_or_nan(F64x2 a, F64x2 b) {
  const uint64x2_t number = vceqq_f64(a.v, a.v);
  return {vbslq_f64(vornq_u64(vcgtq_f64(a.v, b.v), number), a.v, b.v)};
}

}  // namespace
}  // namespace fused_adam
