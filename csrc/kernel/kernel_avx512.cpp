#include "../simd/avx512.hpp"
#include "variants.hpp"

const fused_adam::KernelTable fused_adam::kernels_avx512 = kernel_table<F32x16, F64x8>();
