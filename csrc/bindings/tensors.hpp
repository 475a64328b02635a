// Arrays of others, as their memory: NumPy's, and tensors of PyTorch by the table of C functions
// that its type has for DLPack (https://dmlc.github.io/dlpack/latest/), without linking against it.
#pragma once

#include <pybind11/pybind11.h>

#include <stdint.h>

#include "../overlap.hpp"
#include "../stream_table.hpp"
#include "arrays.hpp"

namespace fused_adam {

namespace py = pybind11;

// Elements that are not one block of memory, or not in the order of their param's: a copy is.
struct LayoutError : py::value_error {
  using py::value_error::value_error;
};

// What a step depends on. Borrowed from the array, valid while it is.
struct Block {
  static constexpr int kMostDimensions = 64;

  void* data;
  int64_t size;
  int nd;
  int64_t shape[kMostDimensions], strides[kMostDimensions];  // in elements
  DType dtype;
  bool mapped;

  int64_t bytes() const { return size * size_of(dtype); }
  Memory memory() const { return {data, bytes(), mapped}; }
  // Whether its elements are all of a piece of memory, in whatever order.
  bool is_dense() const;
  // Whether they lie in it as those of the other.
  bool lies_as(const Block& other) const;
};

// How many steps: a number in an array of shape (), which is raised in place.
class StepCount {
 public:
  int64_t value() const;  // ValueError where it is no whole number >= 0
  void set(int64_t count) const;

  void* data;
  enum { kFloat32Count, kFloat64Count, kInt64Count } type;
};

class TensorReader {
 public:
  // tensor_type: one with __dlpack_c_exchange_api__, or None: then there are only NumPy's arrays.
  explicit TensorReader(const py::object& tensor_type);

  // ours: what may stand there as a type of our own arrays, besides what params may be.
  Block block(py::handle array, const Place& place, DType ours, bool written) const;
  StepCount step_count(py::handle array, const Place& place) const;

 private:
  struct Table;
  bool is_tensor(py::handle array) const;

  py::object type_;
  const Table* table_ = nullptr;
};

}  // namespace fused_adam
