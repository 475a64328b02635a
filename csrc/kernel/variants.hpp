// The combinations that exist, in full view. F32 and F64 are the vector types of one ISA.
#pragma once

#include "adam_kernel.hpp"

namespace fused_adam {
namespace {

// Only what changes the formula or adds a stream is a variant. An option that is a number (lr, eps,
// maximize, decoupled decay) is a coefficient and costs no code.
template <class F32, class F64>
constexpr KernelTable kernel_table() {
  //                    l2     amsgrad
  return {{{{adam_kernel<F32, false, false>, adam_kernel<F32, false, true>},
            {adam_kernel<F32, true, false>, adam_kernel<F32, true, true>}},
           {{adam_kernel<F64, false, false>, adam_kernel<F64, false, true>},
            {adam_kernel<F64, true, false>, adam_kernel<F64, true, true>}}}};
}

}  // namespace
}  // namespace fused_adam
