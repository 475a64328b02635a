// The streams of memory that belong to one parameter. What each of them is: stream_table.hpp.
//
// Plain data and no functions: kernel files include it.
#pragma once

namespace fused_adam {

enum Stream { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kEma, kMasterParam };
constexpr int kStreams = kMasterParam + 1;

// What elements are stored as. The first of them are what is computed in; the others are decoded to
// float32 before, and encoded after.
enum DType { kFloat32, kFloat64, kFloat16, kBFloat16 };
constexpr int kDTypes = kBFloat16 + 1;
constexpr int kComputed = kFloat64 + 1;
constexpr int kCoded = kDTypes - kComputed;

// Where each stream of a parameter begins, or of a piece of one; null where there is none.
struct Streams {
  void* at[kStreams];
};

}  // namespace fused_adam
