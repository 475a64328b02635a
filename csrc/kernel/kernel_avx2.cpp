#include "../simd/avx2.hpp"
#include "variants.hpp"

const fused_adam::KernelTable fused_adam::kernels_avx2 = kernel_table<F32x8, F64x4>();
