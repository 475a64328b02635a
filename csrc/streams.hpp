// The streams of memory that belong to one parameter. What each of them is: stream_table.hpp.
//
// Plain data and no functions: kernel files include it.
#pragma once

namespace fused_adam {

enum Stream {
  kParam,
  kGrad,
  kExpAvg,
  kExpAvgSq,
  kMaxExpAvgSq,
  kEma,
  kMasterParam,
  kExpAvgScale,
  kExpAvgSqScale
};
constexpr int kStreams = kExpAvgSqScale + 1;

// The running averages, from kExpAvg on.
constexpr int kMoments = 3;

// What elements are stored as. The first of them are what is computed in; the others are decoded to
// float32 before, and encoded after. Parameters and gradients are of types up to kBFloat16.
//
// kE4M3 and kE5M3 are the two codings of 8 bits: kBlock elements share the exponent, a byte
// elsewhere (kExponent), that theirs count from.
enum DType { kFloat32, kFloat64, kFloat16, kBFloat16, kE4M3, kE5M3, kExponent };
constexpr int kDTypes = kExponent + 1;
constexpr int kComputed = kFloat64 + 1;
constexpr int kParamTypes = kBFloat16 + 1;
constexpr int kRounded =
    kParamTypes - kComputed;  // to the nearest, where nothing else is asked for
constexpr int kCoded = kE5M3 + 1 - kComputed;

// Elements that share a scale, and a word of their dither. The exponents of 64 were as exact but
// for lognormal gradients (an update's error of .125, of 128 .139), and finding the largest of
// twice as many blocks takes longer.
constexpr int kBlock = 128;

// Where each stream of a parameter begins, or of a piece of one; null where there is none.
struct Streams {
  void* at[kStreams];
};

}  // namespace fused_adam
