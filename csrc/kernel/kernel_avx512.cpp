#include "../simd/avx512.hpp"
#include "variants.hpp"

const fused_adam::StageTable fused_adam::stages_avx512 = stage_table<F32x16, F64x8>();
