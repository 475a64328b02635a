// One step on arrays that the caller owns.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../parallel.hpp"

namespace fused_adam {

namespace py = pybind11;

// options: as in a parameter group. step >= 1. max_exp_avg_sq may be None without amsgrad. The
// checks are those of Optimizer::step.
void adam_step(const std::string& isa, const Threads& threads, const py::dict& options,
               int64_t step, py::handle param, py::handle grad, py::handle exp_avg,
               py::handle exp_avg_sq, py::handle max_exp_avg_sq);

}  // namespace fused_adam
