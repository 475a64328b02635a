// One step on arrays that the caller owns.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../parallel.hpp"
#include "../step.hpp"

namespace fused_adam {

namespace py = pybind11;

// options: as in a parameter group. step >= 1. arrays: by the names of the table of streams; None
// for those that these options do not need. The checks are those of Optimizer::step.
StepReport adam_step(const std::string& isa, const Threads& threads, const py::dict& options,
                     int64_t step, const py::dict& arrays, bool zero_grad, py::handle grad_scale,
                     bool allow_mixed);

}  // namespace fused_adam
