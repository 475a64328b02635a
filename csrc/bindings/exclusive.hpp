// Who may use an optimizer. Two calls at once on one optimizer would race: the second is refused.
#pragma once

#include <atomic>
#include <stdexcept>

namespace fused_adam {

enum class Use {
  kNone,
  kCall,      // somebody has exclusive use
  kAverages,  // they are in the place of their params
};

constexpr char kNoAverages[] = "the averages are not in the place of the parameters.";

// Exclusive use, for as long as an object lives: RuntimeError where somebody else has it.
class Exclusive {
 public:
  explicit Exclusive(std::atomic<Use>& use, Use from = Use::kNone) : use_(use), next_(from) {
    Use found = from;
    if (!use_.compare_exchange_strong(found, Use::kCall, std::memory_order_acquire)) refuse(found);
  }
  ~Exclusive() { use_.store(next_, std::memory_order_release); }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

  // What it is afterwards, in place of what it was before.
  void leave_for(Use next) { next_ = next; }

 private:
  [[noreturn]] static void refuse(Use found) {
    switch (found) {
      case Use::kCall:
        throw std::runtime_error(
            "this optimizer is in use: by another thread, by a call that this one is part of, or "
            "by a thread that was inside a step when this process was forked. Give each thread an "
            "optimizer of its own, or guard this one with a lock.");
      case Use::kAverages:
        throw std::runtime_error(
            "the averages are in the place of the parameters: inside `with opt.ema_weights()` an "
            "optimizer can do nothing else.");
      case Use::kNone:
        break;
    }
    throw std::runtime_error(kNoAverages);
  }

  std::atomic<Use>& use_;
  Use next_;
};

}  // namespace fused_adam
