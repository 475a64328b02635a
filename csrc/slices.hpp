// Arrays, one after the other, and their slices: how work is cut among threads.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "float_mode.hpp"
#include "parallel.hpp"
#include "stream_table.hpp"

namespace fused_adam {

// Work is cut at multiples of a cache line of what is computed in: no two threads write to the same
// line of aligned moments, and a float64 element counts twice a float32 one, as it does for memory.
// One of 16 bits counts as what it is decoded to, with which it takes as long.
constexpr int64_t kLineBytes = 64;

// In bytes: to divide by the elements of a line, which the compiler does not know, took a tenth of
// the time of 1000 small arrays.
constexpr int64_t lines_of(DType dtype, int64_t elements) {
  return (elements * size_of(computed_in(dtype)) + kLineBytes - 1) / kLineBytes;
}

struct ElementsPerLine {
  int64_t of[kDTypes] = {};
  constexpr ElementsPerLine() {
    for (int i = 0; i < kDTypes; ++i)
      of[i] = kLineBytes / size_of(computed_in(static_cast<DType>(i)));
  }
};
constexpr ElementsPerLine kElementsPerLine;

// Calls body(array, first, last) for slices that make up all arrays, on several threads where that
// pays, in the floating-point mode of all computations. An Array has a size, a dtype, and line_end:
// its lines and those of all before it.
template <class Array, class Body>
void for_slices(const std::vector<Array>& arrays, const Threads& threads, Body body) noexcept {
  if (arrays.empty()) return;
  for_lines(arrays.back().line_end, threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatMode mode;
    auto array = std::upper_bound(arrays.begin(), arrays.end(), begin,
                                  [](int64_t line, const Array& a) { return line < a.line_end; });
    int64_t line_begin = array == arrays.begin() ? 0 : (array - 1)->line_end;
    for (; array != arrays.end() && line_begin < end; line_begin = array->line_end, ++array) {
      const int64_t per_line = kElementsPerLine.of[array->dtype];
      const int64_t first = std::max<int64_t>(begin - line_begin, 0) * per_line;
      const int64_t last = std::min((end - line_begin) * per_line, array->size);
      body(*array, first, last);
    }
  });
}

inline void* element_at(void* array, DType dtype, int64_t i) {
  return static_cast<char*>(array) + i * size_of(dtype);
}
inline const void* element_at(const void* array, DType dtype, int64_t i) {
  return static_cast<const char*>(array) + i * size_of(dtype);
}

}  // namespace fused_adam
