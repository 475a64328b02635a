#include "../simd/avx2.hpp"
#include "variants.hpp"

const fused_adam::StageTable fused_adam::stages_avx2 = stage_table<F32x8, F64x4>();
