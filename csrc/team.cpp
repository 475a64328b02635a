#include "team.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#endif
#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fused_adam {
namespace {

using Clock = std::chrono::steady_clock;

void pause() noexcept {
#if defined(__SSE2__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// How long a helper looks for the next step before it sleeps. Waking it costs the caller a few us
// and takes 30 to 50 us; steps that follow each other more closely than this find it awake.
constexpr std::chrono::microseconds kLookout{50};

constexpr int kMaxThreads = kMaxChunks;

// A thread inherits the mask of blocked signals. Helpers block all but faults: a signal that the
// program waits for in a thread of its own must not end up with one of them, and end the process.
class NoSignals {
#if defined(__unix__) || defined(__APPLE__)
 public:
  NoSignals() noexcept {
    sigset_t all;
    sigfillset(&all);
    // Of a fault in the thread itself: blocked, it ends the process without a word of faulthandler.
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &saved_);
  }
  ~NoSignals() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }

 private:
  sigset_t saved_;
#endif
};

// What helpers need to know to take part, in one word: the number of the job, its chunks, its
// threads, and whether those that sleep are to be woken.
struct Ticket {
  uint32_t job;
  uint16_t chunks;
  uint16_t threads : 15;
  uint16_t wake : 1;
};
static_assert(std::atomic<Ticket>::is_always_lock_free);
static_assert(kMaxChunks < 1 << 15);

// Where one helper sleeps. Each has a place of its own: with one for all, a step of 2 threads woke
// every helper that some step had ever started, and took 1.5 times as long beside 6 of them, 13
// times beside 510.
struct Bed {
  std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable wake;
};

class Team {
 public:
  int64_t run(const Job& job, int threads, bool wake) noexcept {
    // One step at a time: if another thread's has the helpers, the CPUs are in use anyway.
    if (in_use_.exchange(true, std::memory_order_acquire)) return run_alone(job);
    threads = std::min({threads, job.chunks, kMaxThreads});
    threads = std::min(threads, 1 + (wake ? hire(threads - 1) : helpers_));
    const int64_t waited = threads > 1 ? lead(job, threads, wake) : run_alone(job);
    in_use_.store(false, std::memory_order_release);
    return waited;
  }

  static int64_t run_alone(const Job& job) noexcept {
    for (int i = 0; i < job.chunks; ++i) job.body(job.context, i);
    return 0;
  }

 private:
  // Claims count jobs: a helper that comes late cannot claim a chunk of a later job by mistake.
  static uint64_t open(uint32_t number) noexcept { return 2 * static_cast<uint64_t>(number); }

  // Starts helpers until there are that many, or until the system refuses one; returns their
  // number.
  int hire(int wanted) noexcept {
    if (helpers_ >= wanted || (refused_ > 0 && --refused_ > 0)) return helpers_;
    [[maybe_unused]] const NoSignals no_signals;
    try {
      for (; helpers_ < wanted; ++helpers_) {
        Bed*& bed = beds_[helpers_ + 1];
        if (bed == nullptr) bed = new Bed;
        std::thread(&Team::help, this, helpers_ + 1, ticket_.load()).detach();
      }
    } catch (...) {
      refused_ = 1000;  // a limit on threads or memory: the step goes on with those it has
    }
    return helpers_;
  }

  int64_t lead(const Job& job, int threads, bool wake) noexcept {
    const Ticket ticket = {ticket_.load(std::memory_order_relaxed).job + 1,
                           static_cast<uint16_t>(job.chunks),
                           static_cast<uint16_t>(threads & 0x7FFF), wake};
    for (int i = 0; i < job.chunks; ++i) {
      claims_[i].store(open(ticket.job), std::memory_order_relaxed);
    }
    job_ = job;
    unfinished_.store(job.chunks, std::memory_order_relaxed);
    // Sequentially consistent, as is `asleep`: either a helper sees this ticket before it sleeps,
    // or it is seen as a sleeper by whoever has seen this ticket.
    ticket_.store(ticket);
    wake_two(ticket, 0);
    work(ticket, 0);
    return wait_for_others();
  }

  void help(int self, Ticket seen) noexcept {
    while (true) {
      seen = next_ticket(self, seen);
      wake_two(seen, self);
      work(seen, self);
    }
  }

  // Everyone who takes part wakes two more, so that the caller pays for two, however many there
  // are.
  void wake_two(Ticket ticket, int self) noexcept {
    if (!ticket.wake) return;
    for (int next = 2 * self + 1; next <= 2 * self + 2 && next < ticket.threads; ++next) {
      Bed& bed = *beds_[next];
      if (!bed.asleep.load()) continue;
      {
        // Else the sleeper might have looked at the ticket already, and not be waiting yet.
        const std::lock_guard<std::mutex> lock(bed.mutex);
      }
      bed.wake.notify_one();
    }
  }

  // The next ticket in which this helper takes part. Those without it do not keep it awake.
  Ticket next_ticket(int self, Ticket seen) noexcept {
    Ticket ticket = seen;
    const auto takes_part = [&] {
      ticket = ticket_.load();
      return ticket.job != seen.job && self < ticket.threads;
    };
    for (const auto end = Clock::now() + kLookout; Clock::now() < end;) {
      for (int i = 0; i < 32; ++i) {
        if (takes_part()) return ticket;
        pause();
      }
      std::this_thread::yield();  // the caller may be waiting for this very CPU
    }
    Bed& bed = *beds_[self];
    std::unique_lock<std::mutex> lock(bed.mutex);
    bed.asleep.store(true);
    bed.wake.wait(lock, takes_part);
    bed.asleep.store(false);
    return ticket;
  }

  void work(Ticket ticket, int self) noexcept {
    // From one's own share on, once around.
    const int first = ticket.chunks * self / ticket.threads;
    for (int i = 0; i < ticket.chunks; ++i) {
      const int chunk = first + i < ticket.chunks ? first + i : first + i - ticket.chunks;
      uint64_t expected = open(ticket.job);
      if (!claims_[chunk].compare_exchange_strong(expected, expected + 1)) continue;
      job_.body(job_.context, chunk);
      unfinished_.fetch_sub(1, std::memory_order_release);
    }
  }

  int64_t wait_for_others() noexcept {
    if (unfinished_.load(std::memory_order_acquire) == 0) return 0;
    const auto begin = Clock::now();
    for (int spins = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < 4096) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
  }

  std::atomic<bool> in_use_{false};
  int helpers_ = 0;  // guarded by in_use_, as is the next
  int refused_ = 0;  // how many steps are still not to ask for another helper
  Job job_ = {};     // written before a ticket is issued; stays until all chunks are finished
  std::atomic<Ticket> ticket_{Ticket{0, 0, 0, 0}};
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<uint64_t> claims_[kMaxChunks] = {};
  Bed* beds_[kMaxThreads] = {};  // of helpers; written before the first ticket that has them
};

// One team a process, never destroyed: its helpers may still be asleep in it when the process ends.
std::atomic<Team*> the_team{nullptr};

Team* team() noexcept {
  Team* current = the_team.load(std::memory_order_acquire);
  if (current != nullptr) return current;
  Team* fresh = new (std::nothrow) Team;
  if (fresh == nullptr) return nullptr;
  if (the_team.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;
  return current;
}

}  // namespace

int64_t run_with_team(const Job& job, int threads, bool wake) noexcept {
  Team* const helpers = team();
  return helpers == nullptr ? Team::run_alone(job) : helpers->run(job, threads, wake);
}

void forget_team() noexcept { the_team.store(nullptr, std::memory_order_relaxed); }

}  // namespace fused_adam
