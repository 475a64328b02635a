// Whether a step is worth several threads, how many, and how its work is cut.
#pragma once

#include <stdint.h>

namespace fused_adam {

// Calls body(context, begin, end) on ranges that make up [0, lines), cache lines of params; on
// several threads where that pays. max_threads 0 means max_threads_here().
void for_lines(int64_t lines, int max_threads, void (*body)(void*, int64_t, int64_t),
               void* context) noexcept;

template <class Body>
void for_lines(int64_t lines, int max_threads, Body body) noexcept {
  const auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<Body*>(context))(begin, end);
  };
  for_lines(lines, max_threads, call, &body);
}

// min(OpenMP's limit for this thread, CPUs that this process may use).
int max_threads_here() noexcept;

// The version date of the OpenMP standard, as in the macro _OPENMP; 0 without OpenMP.
int openmp_version() noexcept;

}  // namespace fused_adam
