#include "tensors.hpp"

#include <cmath>
#include <cstring>

namespace fused_adam {
namespace {

// As DLPack 1.x lays them out.
struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5;
constexpr const char* kApi = "__dlpack_c_exchange_api__";

bool is_type(const DLDataType& type, uint8_t code, uint8_t bits) {
  return type.code == code && type.bits == bits && type.lanes == 1;
}

DType dtype_of_tensor(const DLDataType& type, py::handle tensor, const Place& place, DType ours) {
  if (is_type(type, kFloat, 32)) return kFloat32;
  if (is_type(type, kFloat, 64)) return kFloat64;
  if (is_type(type, kFloat, 16)) return kFloat16;
  if (is_type(type, kBfloat, 16)) return kBFloat16;
  if (is_type(type, kUInt, 8) && size_of(ours) == 1) return ours;
  throw py::type_error(
      place.str() + " has dtype " + py::str(tensor.attr("dtype")).cast<std::string>() +
      ", expected float32, float64, float16 or bfloat16." +
      (type.code == kComplex ? " Use torch.optim.Adam for complex parameters." : ""));
}

}  // namespace

struct TensorReader::Table {
  uint32_t major, minor;
  void* older;
  int (*allocator)(DLTensor*, void**, void*, void*);
  int (*managed_from_object)(void*, void**);
  int (*managed_to_object)(void*, void**);
  int (*from_object)(void*, DLTensor*);
};

bool Block::is_dense() const {
  int64_t expected = 1;
  int i = nd - 1;
  for (; i >= 0 && (shape[i] == 1 || strides[i] == expected); --i) expected *= shape[i];
  if (i < 0 || size == 0) return true;  // in C order
  // In another one: each dimension has the stride that the ones before it leave.
  expected = 1;
  bool taken[kMostDimensions] = {};
  for (int found = 0; found < nd; ++found) {
    int next = -1;
    for (int d = 0; d < nd && next < 0; ++d) {
      if (!taken[d] && (shape[d] == 1 || strides[d] == expected)) next = d;
    }
    if (next < 0) return false;
    taken[next] = true;
    expected *= shape[next];
  }
  return true;
}

bool Block::lies_as(const Block& other) const {
  for (int i = 0; i < nd; ++i) {
    if (shape[i] != 1 && strides[i] != other.strides[i] && size != 0) return false;
  }
  return true;
}

int64_t StepCount::value() const {
  double count = 0.0;
  switch (type) {
    case kFloat32Count: {
      float narrow;
      memcpy(&narrow, data, sizeof narrow);
      count = static_cast<double>(narrow);
      break;
    }
    case kFloat64Count:
      memcpy(&count, data, sizeof count);
      break;
    case kInt64Count: {
      int64_t whole;
      memcpy(&whole, data, sizeof whole);
      if (whole >= 0 && whole < INT64_MAX) return whole;
      count = -1.0;
      break;
    }
  }
  if (!(count >= 0.0 && count < 0x1p53 && std::floor(count) == count)) {
    throw py::value_error("a step count must be a whole number >= 0, got " +
                          py::repr(py::float_(count)).cast<std::string>() + ".");
  }
  return static_cast<int64_t>(count);
}

void StepCount::set(int64_t count) const {
  const auto narrow = static_cast<float>(count);
  const auto wide = static_cast<double>(count);
  switch (type) {
    case kFloat32Count:
      memcpy(data, &narrow, sizeof narrow);
      break;
    case kFloat64Count:
      memcpy(data, &wide, sizeof wide);
      break;
    case kInt64Count:
      memcpy(data, &count, sizeof count);
      break;
  }
}

TensorReader::TensorReader(const py::object& tensor_type) {
  if (tensor_type.is_none()) return;
  const py::object capsule = tensor_type.attr(kApi);
  const void* const table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (table == nullptr) throw py::error_already_set();
  table_ = static_cast<const Table*>(table);
  if (table_->major != 1 || table_->from_object == nullptr) {
    throw py::type_error("this DLPack table is not one of version 1.");
  }
  type_ = tensor_type;  // which keeps the table
}

bool TensorReader::is_tensor(py::handle array) const {
  return table_ != nullptr &&
         PyType_IsSubtype(Py_TYPE(array.ptr()), reinterpret_cast<PyTypeObject*>(type_.ptr())) != 0;
}

Block TensorReader::block(py::handle array, const Place& place, DType ours, bool written) const {
  Block block;
  block.size = 1;
  if (!is_tensor(array)) {
    const ArrayFacts facts = array_facts(array, place, ours);
    if (written) require_writeable(array, place, "a step updates it in place.");
    block.data = facts.data;
    block.nd = facts.nd;
    block.dtype = facts.dtype;
    block.mapped = facts.mapped;
    const py::ssize_t* const strides = py::detail::array_proxy(array.ptr())->strides;
    for (int i = 0; i < facts.nd; ++i) {
      block.shape[i] = facts.shape[i];
      block.strides[i] = strides[i] / size_of(facts.dtype);
      block.size *= facts.shape[i];
    }
    return block;
  }
  DLTensor tensor;
  if (table_->from_object(array.ptr(), &tensor) != 0) throw py::error_already_set();
  if (tensor.device.type != kCpu) {
    throw py::value_error(place.str() + " is on " +
                          py::str(array.attr("device")).cast<std::string>() +
                          ", and this optimizer is for CPUs. Use torch.optim there.");
  }
  if (tensor.ndim > Block::kMostDimensions) {
    throw py::value_error(place.str() + " has more than 64 dimensions.");
  }
  block.dtype = dtype_of_tensor(tensor.dtype, array, place, ours);
  block.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  block.nd = tensor.ndim;
  block.mapped = false;
  for (int i = 0; i < tensor.ndim; ++i) block.size *= tensor.shape[i];
  int64_t in_order = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    block.shape[i] = tensor.shape[i];
    block.strides[i] = tensor.strides == nullptr ? in_order : tensor.strides[i];
    in_order *= tensor.shape[i];
  }
  if (block.data == nullptr && block.size != 0) {
    throw py::value_error(place.str() + " has no memory (a meta or wrapped tensor).");
  }
  if (reinterpret_cast<uintptr_t>(block.data) % static_cast<uintptr_t>(size_of(block.dtype)) != 0) {
    throw LayoutError(place.str() + " is not aligned.");
  }
  return block;
}

StepCount TensorReader::step_count(py::handle array, const Place& place) const {
  StepCount count;
  if (is_tensor(array)) {
    DLTensor tensor;
    if (table_->from_object(array.ptr(), &tensor) != 0) throw py::error_already_set();
    const bool scalar = tensor.ndim == 0 && tensor.device.type == kCpu;
    count.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    if (scalar && is_type(tensor.dtype, kFloat, 32)) {
      count.type = StepCount::kFloat32Count;
      return count;
    }
    if (scalar && is_type(tensor.dtype, kFloat, 64)) {
      count.type = StepCount::kFloat64Count;
      return count;
    }
    if (scalar && is_type(tensor.dtype, kInt, 64)) {
      count.type = StepCount::kInt64Count;
      return count;
    }
  } else if (py::isinstance<py::array>(array)) {
    const auto numbers = py::reinterpret_borrow<py::array>(array);
    const bool writeable = numbers.ndim() == 0 && numbers.writeable();
    count.data = py::detail::array_proxy(array.ptr())->data;
    if (writeable && py::isinstance<py::array_t<int64_t>>(array)) {
      count.type = StepCount::kInt64Count;
      return count;
    }
    if (writeable && py::isinstance<py::array_t<double>>(array)) {
      count.type = StepCount::kFloat64Count;
      return count;
    }
    if (writeable && py::isinstance<py::array_t<float>>(array)) {
      count.type = StepCount::kFloat32Count;
      return count;
    }
  }
  throw py::type_error(place.str() +
                       " must be an array or tensor of shape (), of float32, float64 or int64.");
}

}  // namespace fused_adam
