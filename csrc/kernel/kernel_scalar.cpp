#include "../simd/scalar.hpp"
#include "variants.hpp"

const fused_adam::StageTable fused_adam::stages_scalar = stage_table<F32x1, F64x1>();
