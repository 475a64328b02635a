// The arrays that belong to an optimizer, and gradient buffers.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "../stream_table.hpp"
#include "arrays.hpp"

namespace fused_adam {

namespace py = pybind11;

struct NewArray {
  ArrayFacts param;
  Storage storage;
  Stream stream;
};

// Of a stream's array: that of param, or one dimension.
std::vector<py::ssize_t> shape_of(Stream stream, const ArrayFacts& param, const Storage& storage);

// Numbers for each element of param, in its order, which nobody is to write.
py::array new_numbers(const ArrayFacts& param);

// Arrays of zeros for these streams of these params. Each starts at a multiple of 64 bytes. Those
// of a large param lie where the table of streams says, relative to its own beginning within a
// page: a CPU that compares only the low 12 bits of addresses would otherwise take the load of one
// stream for a load after the store of another.
//
// All of them are views of one block, which the operating system fills with zeros only where it is
// touched: by the threads of the first step. np.zeros does as much, but whoever gets hold of an
// array that owns its memory, as the base of a view, can resize it under the view. This one
// refuses.
std::vector<py::object> new_arrays(const std::vector<NewArray>& wanted);

// Fills arrays with elements that follow each other, all that there are: a loop for arrays that are
// too small for one of Python. False, with nothing done, where one of them is not in C order, not
// of the dtype of the elements or read-only, or there are more or fewer elements.
bool scatter(const py::array& elements, const std::vector<py::array>& arrays);

}  // namespace fused_adam
