// How many threads a step uses, and running its parts on them. The only room that knows OpenMP.
#pragma once

#include <stdint.h>

namespace fused_adam {

// Into how many parts to cut a step over that many cache lines of params: 1 below a measured size,
// in a forked child and inside another parallel region. max_threads 0 means max_threads_here().
int parts_for(int64_t lines, int max_threads) noexcept;

// Runs body(context, part) for all parts of [0, parts), each once, and waits for them; for 1 part
// on the calling thread, without entering any OpenMP construct.
void run_parts(int parts, void (*body)(void* context, int part), void* context) noexcept;

template <class Body>
void run_parts(int parts, Body body) noexcept {
  run_parts(parts, [](void* context, int part) { (*static_cast<Body*>(context))(part); }, &body);
}

// min(OpenMP's limit for this thread, CPUs that this process may use); 1 without OpenMP.
int max_threads_here() noexcept;

// The version date of the OpenMP standard, as in the macro _OPENMP; 0 without OpenMP.
int openmp_version() noexcept;

// To be called once, when the module is loaded: steps in a forked child stay on one thread, because
// libgomp's team does not survive a fork and the first region in the child would wait for ever.
void watch_forks() noexcept;

}  // namespace fused_adam
