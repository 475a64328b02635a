// Whether the CPUs are wanted by others, so that a step had better stay on its own thread.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <atomic>

namespace fused_adam {

// Where other processes want the CPUs too, a helper is interrupted in the middle of a chunk, and
// the step waits for it until it runs again: 3 to 12 ms. After such a stall, steps stay on their
// own thread for a while: 16 times as long as it was. Where it then happens again at once, more
// than a sixteenth of the time with helpers would be lost to waiting: twice as long as the last
// time. In between, as a virtual machine whose host takes a CPU for 1 ms three times a second does
// it, helpers are worth having: a pause of 250 ms after each of these left two threads half of the
// time as one. It changes no result, only who computes.
class StallWatch {
 public:
  // Times in ns, of one clock.
  bool calm(int64_t now) const noexcept {
    return now >= alone_until_.load(std::memory_order_relaxed);
  }

  void report(int64_t waited, int64_t begin, int64_t end) noexcept {
    const int64_t together = together_.load(std::memory_order_relaxed);
    if (waited <= kStall || 4 * waited <= end - begin) {
      together_.store(together + (end - begin), std::memory_order_relaxed);
      return;
    }
    const bool is_soon = together < kPause * waited;
    const int64_t last = is_soon ? pause_.load(std::memory_order_relaxed) : 0;
    const int64_t pause = std::min(std::max(2 * last, kPause * waited), kLongestPause);
    pause_.store(pause, std::memory_order_relaxed);
    alone_until_.store(end + pause, std::memory_order_relaxed);
    together_.store(0, std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kPause = 16;
  // All in ns.
  static constexpr int64_t kStall = 100'000, kLongestPause = 4'000'000'000;
  std::atomic<int64_t> alone_until_{0};
  std::atomic<int64_t> pause_{0};                 // the last one
  std::atomic<int64_t> together_{kLongestPause};  // in steps with helpers, since the last stall
};

}  // namespace fused_adam
