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
