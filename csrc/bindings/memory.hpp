// Memory that belongs to an optimizer.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace fused_adam {

namespace py = pybind11;

// A one-dimensional uint8 array of that many zeros, which the operating system makes only where
// they are touched: by the threads of the first step. np.zeros does as much, but an array that owns
// its memory can be resized by whoever gets hold of it, as the base of a view, and the view is left
// with memory that is gone. This one refuses.
py::array zeroed(py::ssize_t bytes);

}  // namespace fused_adam
