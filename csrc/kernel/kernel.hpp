// The border between the kernels and the rest: plain data and function pointers.
//
// Kernel files see only this header, what it includes, and intrinsics, so that no inline function
// is ever compiled both with and without the flags of an ISA (the linker would keep either).
#pragma once

#include <stdint.h>

#include "../coefficients.hpp"
#include "../dither.hpp"
#include "../streams.hpp"

namespace fused_adam {

// Names the formula, its roundings (adam_rule.hpp) and those of its coefficients
// (coefficients.cpp): equal ids give equal bits. Whoever changes a rounding changes the id.
constexpr char kNumerics[] = "adam-1";

// One thing that is done to a piece of a parameter: to the first `count` elements of its streams.
using Stage = void (*)(const Streams&, int64_t count, const CoefficientSet&);

// How a piece is stored that is not all in the type that is computed in, for the rule on such.
struct CodedStep {
  DType param, grad, exp_avg;  // the other moments alike
  bool l2, amsgrad;
  int64_t first;  // the number of the first element in its array: a multiple of 16, or of kBlock
  uint32_t dithers[kMoments];
};
using CodedStage = void (*)(const Streams&, int64_t count, const CoefficientSet&, const CodedStep&);

// Stages that deal with the gradient alone. To leave what the rule takes for it in `scaled`:
using ScaleGrad = void (*)(const void* grad, void* scaled, int64_t count,
                           const GradCoefficientSet&);
using ClearGrad = void (*)(void* grad, int64_t count);
using AddGrad = void (*)(const void* grad, void* sum, int64_t count);
// Elements of a stored type to float32, and the reverse: to the nearest, or dithered, where `first`
// is the number of the first element in its array. exponents: of blocks of them, in codings of 8
// bits, whose first element begins one.
using Decode = void (*)(const void* from, const uint8_t* exponents, float* to, int64_t count);
using Encode = void (*)(const float* from, void* to, int64_t count);
using EncodeDithered = void (*)(const float* from, void* to, uint8_t* exponents, int64_t first,
                                int64_t count, uint32_t dither);
// To add squares to the kNormLanes lanes of their block. position: of the first element in it.
using AddSquares = void (*)(const void* grad, int64_t position, int64_t count, double* lanes);
constexpr int64_t kNormBlock = 4096;  // elements
constexpr int kNormLanes = 16;        // sums that do not wait for each other: 8 are 10 % slower

// The stages of one ISA. variants.hpp lists them; step.cpp puts steps together from them.
struct StageTable {
  Stage adam[kComputed][2][2];  // with L2 decay, with amsgrad
  CodedStage coded_adam[HyperParameters::kStateDTypes];
  Stage begin_average[kComputed];
  Stage average[kComputed];
  ClearGrad clear_grad[kComputed];
  ScaleGrad scale_grad[kComputed][2];  // by a product; by a division
  AddSquares add_squares[kComputed];
  AddGrad add_grad[kComputed];
  Decode decode[kCoded];
  Encode encode[kRounded];
  EncodeDithered encode_dithered[kCoded];
};

// One table per ISA, each compiled with flags of its own; dispatch.cpp says which exist.
extern const StageTable stages_scalar;
extern const StageTable stages_avx2;
extern const StageTable stages_avx512;
extern const StageTable stages_neon;

}  // namespace fused_adam
