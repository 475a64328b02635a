#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "cpu_limit.hpp"
#include "team.hpp"

#if defined(_OPENMP)
#include <omp.h>
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

// Where other processes want the CPUs too, a helper is interrupted in the middle of a chunk, and
// the step waits for it until it runs again: 3 to 12 ms. After such a stall, steps stay on their
// own thread for a while, twice as long each time it happens again. It changes no result, only who
// computes.
class StallWatch {
 public:
  bool calm(int64_t now) const noexcept {
    return now >= alone_until_.load(std::memory_order_relaxed);
  }

  void report(int64_t waited, int64_t begin, int64_t end) noexcept {
    const int64_t pause = pause_.load(std::memory_order_relaxed);
    if (waited > kStall && 4 * waited > end - begin) {
      alone_until_.store(end + pause, std::memory_order_relaxed);
      pause_.store(std::min(2 * pause, kLongestPause), std::memory_order_relaxed);
    } else if (pause > kShortestPause &&
               end > alone_until_.load(std::memory_order_relaxed) + pause) {
      pause_.store(pause / 2, std::memory_order_relaxed);
    }
  }

 private:
  // All in ns.
  static constexpr int64_t kStall = 100'000;
  static constexpr int64_t kShortestPause = 250'000'000, kLongestPause = 4'000'000'000;
  std::atomic<int64_t> alone_until_{0};
  std::atomic<int64_t> pause_{kShortestPause};
};

StallWatch stalls;
std::atomic<int64_t> last_end_ns{0};  // of the last step that could have helpers

int threads_for(int64_t lines, int max_threads) noexcept {
  const int64_t useful = lines / kMinLinesPerThread;
  if (useful < 2 || max_threads == 1) return 1;
#if defined(_OPENMP)
  if (omp_in_parallel()) return 1;
#endif
  const int allowed = max_threads > 0 ? max_threads : max_threads_here();
  return static_cast<int>(std::min<int64_t>(useful, allowed));
}

}  // namespace

void for_lines(int64_t lines, int max_threads, void (*body)(void*, int64_t, int64_t),
               void* context) noexcept {
  const int threads = threads_for(lines, max_threads);
  const int64_t begin = threads > 1 ? now_ns() : 0;
  if (threads == 1 || !stalls.calm(begin)) {
    body(context, 0, lines);
    return;
  }
  const int64_t per_thread =
      std::clamp<int64_t>(lines / threads / kMinLinesPerChunk, 1, kMaxChunksPerThread);
  const int chunks = static_cast<int>(std::min<int64_t>(threads * per_thread, kMaxChunks));
  const auto chunk = [&](int i) {
    // Written so that the product cannot overflow; a chunk is the same lines at every step.
    const auto bound = [&](int j) {
      return lines / chunks * j + std::min<int64_t>(lines % chunks, j);
    };
    body(context, bound(i), bound(i + 1));
  };
  const bool wake =
      lines >= kWorthWaking || begin - last_end_ns.load(std::memory_order_relaxed) < kCloseTogether;
  const int64_t waited = run_with_team(chunks, threads, wake, chunk);
  const int64_t end = now_ns();
  last_end_ns.store(end, std::memory_order_relaxed);
  stalls.report(waited, begin, end);
}

int max_threads_here() noexcept {
#if defined(_OPENMP)
  return std::max(1, std::min(omp_get_max_threads(), usable_cpus()));
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

}  // namespace fused_adam
