#include "memory.hpp"

#include <stdint.h>

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_adam {
namespace {

// Large pages for large blocks, as NumPy asks for them: fewer of them to make, and to look up.
void ask_for_large_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kLarge = size_t{1} << 22, kPage = 4096;
  if (bytes < kLarge) return;
  const size_t skipped = -reinterpret_cast<uintptr_t>(block) % kPage;
  madvise(static_cast<char*>(block) + skipped, bytes - skipped, MADV_HUGEPAGE);
#endif
}

}  // namespace

py::array zeroed(py::ssize_t bytes) {
  // Python's calloc, so that tracemalloc knows of it.
  void* const block = PyMem_RawCalloc(static_cast<size_t>(bytes), 1);
  if (block == nullptr) throw std::bad_alloc();
  const py::capsule owner(block, &PyMem_RawFree);
  ask_for_large_pages(block, static_cast<size_t>(bytes));
  return py::array(py::dtype::of<uint8_t>(), {bytes}, {py::ssize_t{1}}, block, owner);
}

}  // namespace fused_adam
