// What is taken as an array and what is refused, with the message. Nothing is ever copied or
// written.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

#include "../overlap.hpp"
#include "../stream_table.hpp"

namespace fused_adam {

namespace py = pybind11;

// How a message names an array: "grad for params['w'][0]" is {"grad for ", "params", "['w'][0]"}.
// Kept in pieces, because it is rendered only when something is wrong.
struct Place {
  const char* role;
  std::string_view root;
  std::string_view path;

  std::string str() const { return std::string(role).append(root).append(path); }
};

// The facts about an array that a step depends on. Borrowed from the array, valid while it is.
struct ArrayFacts {
  void* data;
  int64_t size;
  int nd;
  const py::ssize_t* shape;
  DType dtype;
  bool c_contiguous, f_contiguous;
  bool mapped;  // of a memory map: np.memmap, SharedMemory

  Memory memory() const { return {data, bytes(), mapped}; }
  int64_t bytes() const { return size * size_of(dtype); }
};

// To be called once, when the module is loaded, before anything else of this file.
void load_array_types();

// The facts of an ndarray (or memmap) of native, aligned elements that a param may have, in C or
// Fortran order. Anything else: TypeError for a wrong type or dtype, else ValueError.
ArrayFacts array_facts(py::handle object, const Place& place);
// Or of elements of this type, as new arrays of ours have them.
ArrayFacts array_facts(py::handle object, const Place& place, DType ours);

// ValueError where the array cannot be written; reason goes on "... is read-only, but".
void require_writeable(py::handle array, const Place& place, const char* reason);

// Is the array as its model is? TypeError for another dtype, ValueError for another shape or
// layout. model_place: null where the model is what the array itself was, when its optimizer was
// made.
void require_like(const ArrayFacts& array, const Place& place, const ArrayFacts& model,
                  const Place* model_place);
// A gradient of that param: one of 16 bits may have one of float32; with mixed, the reverse, too.
void require_grad(const ArrayFacts& grad, const Place& place, const ArrayFacts& param,
                  const Place& param_place, bool mixed);

const char* dtype_name(DType dtype);
// Of our own arrays: NumPy's type for codes that it does not know is that of unsigned numbers.
const char* own_dtype_name(DType dtype);
py::dtype own_dtype(DType dtype);

// A new view, so that what a caller does to its flags or shape does not reach the array itself.
py::object fresh_view(const py::object& array);

}  // namespace fused_adam
