#include "memory.hpp"

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_adam {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line, and of the widest vector
constexpr int64_t kPage = 4096;
constexpr int64_t kLarge = 64 * kPage;  // from here on, a page more is below half a percent
constexpr int64_t kHugePages = int64_t{1} << 22;  // as in NumPy

int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

int64_t within_page(int64_t x) { return ((x % kPage) + kPage) % kPage; }

// Fewer pages to make, and to look up.
void ask_for_huge_pages([[maybe_unused]] char* begin, [[maybe_unused]] int64_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugePages) madvise(begin, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
}

std::vector<py::ssize_t> strides_of(const std::vector<py::ssize_t>& shape, DType dtype,
                                    bool c_contiguous) {
  std::vector<py::ssize_t> strides(shape.size());
  int64_t stride = size_of(dtype);
  for (size_t i = 0; i < shape.size(); ++i) {
    const size_t axis = c_contiguous ? shape.size() - 1 - i : i;
    strides[axis] = stride;
    stride *= std::max<py::ssize_t>(shape[axis], 1);
  }
  return strides;
}

// A view of the block from this place on, in the order of param.
py::object view_of(const py::array& block, char* begin, const NewArray& array) {
  const DType dtype = dtype_of(array.stream, array.storage);
  std::vector<py::ssize_t> shape = shape_of(array.stream, array.param, array.storage);
  std::vector<py::ssize_t> strides = strides_of(shape, dtype, array.param.c_contiguous);
  return py::array(own_dtype(dtype), std::move(shape), std::move(strides), begin, block);
}

}  // namespace

std::vector<py::ssize_t> shape_of(Stream stream, const ArrayFacts& param, const Storage& storage) {
  if (is_like_param(stream, storage)) return {param.shape, param.shape + param.nd};
  return {entries_of(stream, param.size)};
}

py::array new_numbers(const ArrayFacts& param) {
  const DType dtype = computed_in(param.dtype);
  std::vector<py::ssize_t> shape(param.shape, param.shape + param.nd);
  std::vector<py::ssize_t> strides = strides_of(shape, dtype, param.c_contiguous);
  return py::array(own_dtype(dtype), std::move(shape), std::move(strides));
}

std::vector<py::object> new_arrays(const std::vector<NewArray>& wanted) {
  std::vector<int64_t> starts;
  int64_t end = 0;
  for (const NewArray& array : wanted) {
    const int64_t bytes = bytes_of(array.stream, array.storage, array.param.size);
    int64_t start = rounded_up(end, kLine);
    if (bytes >= kLarge) {
      const auto base = static_cast<int64_t>(reinterpret_cast<uintptr_t>(array.param.data));
      const int64_t place = base + kStreamTable[array.stream].page_offset;
      start += within_page(place - start) / kLine * kLine;
    }
    starts.push_back(start);
    end = start + bytes;
  }
  // A whole page to spare, to begin at one. Python's calloc, so that tracemalloc knows of it.
  void* const memory = PyMem_RawCalloc(static_cast<size_t>(end + kPage), 1);
  if (memory == nullptr) throw std::bad_alloc();
  const py::capsule owner(memory, &PyMem_RawFree);
  const py::array block(py::dtype::of<uint8_t>(), {py::ssize_t{end + kPage}}, {py::ssize_t{1}},
                        memory, owner);
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory));
  char* const first_page = static_cast<char*>(memory) + within_page(-address);
  ask_for_huge_pages(first_page, end);
  std::vector<py::object> arrays;
  for (size_t i = 0; i < wanted.size(); ++i) {
    arrays.push_back(view_of(block, first_page + starts[i], wanted[i]));
  }
  return arrays;
}

bool scatter(const py::array& elements, const std::vector<py::array>& arrays) {
  py::ssize_t size = 0;
  for (const py::array& array : arrays) {
    if ((array.flags() & py::array::c_style) == 0) return false;
    if (!array.writeable() || !array.dtype().equal(elements.dtype())) return false;
    size += array.size();
  }
  if ((elements.flags() & py::array::c_style) == 0 || size != elements.size()) return false;
  const auto* from = static_cast<const char*>(elements.data());
  for (const py::array& array : arrays) {
    const auto bytes = static_cast<size_t>(array.nbytes());
    memcpy(py::detail::array_proxy(array.ptr())->data, from, bytes);
    from += bytes;
  }
  return true;
}

}  // namespace fused_adam
