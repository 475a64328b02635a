#include "../simd/neon.hpp"
#include "variants.hpp"

const fused_adam::KernelTable fused_adam::kernels_neon = kernel_table<F32x4, F64x2>();
