#include "../simd/scalar.hpp"
#include "variants.hpp"

const fused_adam::KernelTable fused_adam::kernels_scalar = kernel_table<F32x1, F64x1>();
