#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "cpu_limit.hpp"
#include "stall_watch.hpp"
#include "team.hpp"

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fused_adam {
namespace {

// Below this a second thread does not pay: one updates 1024 lines (16384 float32 elements) in 3 us.
constexpr int64_t kMinLinesPerThread = 1024;

// Helpers that sleep are woken only for steps of this size (524288 float32 elements, 90 us on one
// thread), since waking takes 5 us here and 30 to 50 us there; or where steps follow each other so
// closely that a helper, once woken, stays awake.
constexpr int64_t kWorthWaking = 32768;
constexpr int64_t kCloseTogether = 50'000;  // ns

// Chunks of at least this many lines (4 streams of 64 KiB), at most 16 a thread. With more than
// one, a thread that the system interrupts leaves the rest of its share to the others.
constexpr int64_t kMinLinesPerChunk = 1024;
constexpr int64_t kMaxChunksPerThread = 16;

int64_t now_ns() noexcept {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

StallWatch stalls;
std::atomic<int64_t> last_end_ns{0};  // of the last step that could have helpers

// Has this process been forked since the module was loaded? libgomp hangs in a region of a forked
// child, for ever, if there was one in the parent: ours, or of any other library that uses libgomp,
// of which we cannot know.
std::atomic<bool> forked{false};

int threads_for(int64_t lines, const Threads& threads) noexcept {
  const int64_t useful = lines / kMinLinesPerThread;
  if (useful < 2 || threads.limit == 1) return 1;
#if defined(_OPENMP)
  if (omp_in_parallel()) return 1;
#endif
  if (threads.back_end == Threads::kOpenMP && forked.load(std::memory_order_relaxed)) return 1;
  return static_cast<int>(std::min<int64_t>(useful, most_threads(threads)));
}

// False, with nothing done, for a while after a stall.
template <class Chunk>
bool try_with_team(int64_t lines, int chunks, int threads, const Chunk& chunk) noexcept {
  const int64_t begin = now_ns();
  if (!stalls.calm(begin)) return false;
  const bool wake =
      lines >= kWorthWaking || begin - last_end_ns.load(std::memory_order_relaxed) < kCloseTogether;
  const int64_t waited = run_with_team(chunks, threads, wake, chunk);
  const int64_t end = now_ns();
  last_end_ns.store(end, std::memory_order_relaxed);
  stalls.report(waited, begin, end);
  return true;
}

// The same chunks on the same threads each time: those that OpenMP has bound to a place find the
// memory there that they touched first.
template <class Chunk>
void run_in_region([[maybe_unused]] int threads, int chunks, const Chunk& chunk) noexcept {
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
  for (int i = 0; i < chunks; ++i) chunk(i);  // MSVC wants a signed index
}

}  // namespace

Threads::BackEnd back_end_by_name(const std::string& name) {
  for (const auto back_end : {Threads::kTeam, Threads::kOpenMP}) {
    if (name != name_of(back_end)) continue;
    if (back_end == Threads::kTeam || openmp_version() != 0) return back_end;
    throw std::invalid_argument("this build has no OpenMP; take 'team'.");
  }
  throw std::invalid_argument("must be 'team' or 'openmp', got '" + name + "'.");
}

const char* name_of(Threads::BackEnd back_end) noexcept {
  return back_end == Threads::kTeam ? "team" : "openmp";
}

void for_lines(int64_t lines, const Threads& threads, void (*body)(void*, int64_t, int64_t),
               void* context) noexcept {
  const int count = threads_for(lines, threads);
  if (count == 1) {
    body(context, 0, lines);
    return;
  }
  const int64_t per_thread =
      std::clamp<int64_t>(lines / count / kMinLinesPerChunk, 1, kMaxChunksPerThread);
  const int chunks = static_cast<int>(std::min<int64_t>(count * per_thread, kMaxChunks));
  const auto chunk = [&](int i) {
    // Written so that the product cannot overflow; a chunk is the same lines at every step.
    const auto bound = [&](int j) {
      return lines / chunks * j + std::min<int64_t>(lines % chunks, j);
    };
    body(context, bound(i), bound(i + 1));
  };
  if (threads.back_end == Threads::kOpenMP) {
    run_in_region(count, chunks, chunk);
  } else if (!try_with_team(lines, chunks, count, chunk)) {
    body(context, 0, lines);
  }
}

int most_threads(const Threads& threads) noexcept {
  if (threads.limit > 0) return threads.limit;
#if defined(_OPENMP)
  // Where OMP_PLACES or OMP_PROC_BIND is set, libgomp binds the thread that loads it to the first
  // place: all that its affinity has, and the team's threads, which inherit it, could use. OpenMP
  // goes by all places.
  const int cpus = threads.back_end == Threads::kOpenMP ? std::min(omp_get_num_procs(), cpu_quota())
                                                        : usable_cpus();
  return std::max(1, std::min(omp_get_max_threads(), cpus));
#else
  return usable_cpus();
#endif
}

int openmp_version() noexcept {
#if defined(_OPENMP)
  return _OPENMP;
#else
  return 0;
#endif
}

void watch_forks() noexcept {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] {
    forget_team();
    forked.store(true, std::memory_order_relaxed);
  });
#endif
}

}  // namespace fused_adam
