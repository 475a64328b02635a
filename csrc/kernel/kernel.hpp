// The border between the kernels and the rest: plain data and function pointers.
//
// Kernel files see only this header, coefficients.hpp and intrinsics, so that no inline function is
// ever compiled both with and without the flags of an ISA (the linker would keep either).
#pragma once

#include <stdint.h>

#include "../coefficients.hpp"

namespace fused_adam {

// Names the formula, its roundings (adam_rule.hpp) and those of its coefficients
// (coefficients.cpp): equal ids give equal bits. Whoever changes a rounding changes the id.
constexpr char kNumerics[] = "adam-1";

// The arrays of one parameter, all of one dtype and one length.
struct Streams {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
};

// Updates the elements [begin, end).
using Kernel = void (*)(const Streams&, int64_t begin, int64_t end, const CoefficientSet&);

enum DType { kFloat32, kFloat64, kDTypes };

// The forms of the rule that need code of their own; variants.hpp lists them.
struct Form {
  bool l2;
  bool amsgrad;
};

struct KernelTable {
  Kernel kernels[kDTypes][2][2];

  Kernel at(DType dtype, Form form) const { return kernels[dtype][form.l2][form.amsgrad]; }
};

// One table per ISA, each compiled with flags of its own; dispatch.cpp says which exist.
extern const KernelTable kernels_scalar;
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_neon;

}  // namespace fused_adam
