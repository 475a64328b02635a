// Whether a step is worth several threads, how many, how its work is cut, and who they are.
#pragma once

#include <stdint.h>

#include <string>

namespace fused_adam {

// Whose threads share the work of a step, and how many there may be: chosen once, and handed down.
struct Threads {
  enum BackEnd { kTeam, kOpenMP };
  BackEnd back_end;
  int limit;  // 0: what the machine allows
};

// "team" or "openmp". Throws std::invalid_argument for any other name, and for "openmp" where this
// build has none: never a silent fallback.
Threads::BackEnd back_end_by_name(const std::string& name);
const char* name_of(Threads::BackEnd back_end) noexcept;

// Calls body(context, begin, end) on ranges that make up [0, lines), cache lines of params; on
// several threads where that pays. The body must not throw.
void for_lines(int64_t lines, const Threads& threads, void (*body)(void*, int64_t, int64_t),
               void* context) noexcept;

template <class Body>
void for_lines(int64_t lines, const Threads& threads, Body body) noexcept {
  const auto call = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<Body*>(context))(begin, end);
  };
  for_lines(lines, threads, call, &body);
}

// The most threads of a step that the calling thread begins: the limit; without one, OpenMP's limit
// for this thread, or the CPUs that it may use where these are fewer.
int most_threads(const Threads& threads) noexcept;

// The version date of the OpenMP standard, as in the macro _OPENMP; 0 without OpenMP.
int openmp_version() noexcept;

// To be called once, when the module is loaded. A forked child has none of its parent's threads: it
// starts a team of its own when it needs one; with OpenMP it works alone.
void watch_forks() noexcept;

}  // namespace fused_adam
