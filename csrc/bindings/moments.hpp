// Moments of others, between numbers and what is stored of them.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdint.h>

#include <string>

namespace fused_adam {

namespace py = pybind11;

// The numbers of a moment ("exp_avg") that is stored as codes, or the reverse, as in that step.
// Flat.
py::array decode_moment(const std::string& isa, const std::string& name, const py::array& codes,
                        const py::object& exponents);
// state_dtype: "bfloat16" or "float8". Returns codes and exponents, None where there are none.
py::tuple encode_moment(const std::string& isa, const std::string& name,
                        const std::string& state_dtype, const py::array& numbers, int64_t step);

}  // namespace fused_adam
