// One step on arrays that the caller owns.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../parallel.hpp"

namespace fused_adam {

namespace py = pybind11;

// options: as in a parameter group. step >= 1. arrays: by the names of the table of streams; None
// for those that these options do not need. The checks are those of Optimizer::step.
void adam_step(const std::string& isa, const Threads& threads, const py::dict& options,
               int64_t step, const py::dict& arrays, bool zero_grad);

}  // namespace fused_adam
