// The stages that exist, in full view. F32 and F64 are the vector types of one ISA.
#pragma once

#include "adam_kernel.hpp"
#include "add_kernel.hpp"
#include "average_kernel.hpp"
#include "clear_kernel.hpp"
#include "coded_kernel.hpp"
#include "convert_kernel.hpp"
#include "norm_kernel.hpp"
#include "scale_kernel.hpp"

namespace fused_adam {
namespace {

// Only what changes the formula is a variant of it. An option that is a number (lr, eps, maximize,
// decoupled decay) is a coefficient, and one that only adds to a step is a stage of its own.
template <class F32, class F64>
constexpr StageTable stage_table() {
  // A type that is not in the lists would have null pointers, and a step crash.
  static_assert(kComputed == 2, "each stage needs a variant for each type that is computed in");
  static_assert(kCoded == 4 && kRounded == 2, "each other type needs what decodes and encodes it");
  static_assert(HyperParameters::kStateDTypes == 3, "moments in each need a rule of their own");
  return {
      //  l2     amsgrad
      {{{adam_stage<F32, false, false>, adam_stage<F32, false, true>},
        {adam_stage<F32, true, false>, adam_stage<F32, true, true>}},
       {{adam_stage<F64, false, false>, adam_stage<F64, false, true>},
        {adam_stage<F64, true, false>, adam_stage<F64, true, true>}}},
      {coded_adam_stage<F32, PlainMoments>, coded_adam_stage<F32, BFloat16Moments>,
       coded_adam_stage<F32, Float8Moments>},
      {begin_average_stage<F32>, begin_average_stage<F64>},
      {average_stage<F32>, average_stage<F64>},
      {clear_grad<F32>, clear_grad<F64>},
      {{scale_grad<F32, false>, scale_grad<F32, true>},
       {scale_grad<F64, false>, scale_grad<F64, true>}},
      {add_squares<F64, float>, add_squares<F64, double>},
      {add_grad<F32>, add_grad<F64>},
      {decode<F32, Float16<F32>>, decode<F32, BFloat16<F32>>, decode_blocks<F32, E4M3<F32>>,
       decode_blocks<F32, E5M3<F32>>},
      {encode<F32, Float16<F32>>, encode<F32, BFloat16<F32>>},
      {encode_dithered<F32, Float16<F32>>, encode_dithered<F32, BFloat16<F32>>,
       encode_blocks<F32, E4M3<F32>>, encode_blocks<F32, E5M3<F32>>},
  };
}

}  // namespace
}  // namespace fused_adam
