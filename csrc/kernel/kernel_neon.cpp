#include "../simd/neon.hpp"
#include "variants.hpp"

const fused_adam::StageTable fused_adam::stages_neon = stage_table<F32x4, F64x2>();
