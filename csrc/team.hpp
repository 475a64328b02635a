// The threads that help with large steps: started on first use, asleep between steps.
#pragma once

#include <stdint.h>

namespace fused_adam {

constexpr int kMaxChunks = 4096;

// A piece of work, cut into chunks that may run in any order and on any thread.
struct Job {
  void (*body)(void* context, int chunk);
  void* context;
  int chunks;  // at most kMaxChunks
};

// Runs all chunks on the calling thread and at most threads - 1 helpers; returns when all are done.
//
// Every thread begins with the same chunks each time (memory stays where it was touched first),
// then takes whatever nobody has begun. The caller does too: it never waits for a thread that has
// not started, only for chunks that are being worked on. That is what a barrier cannot do: a member
// that the operating system does not run holds up everybody.
//
// wake: helpers that sleep are woken, missing ones are started. Otherwise only those take part that
// are still awake from the step before.
//
// Returns how long the caller waited for chunks that others had begun, in ns.
int64_t run_with_team(const Job& job, int threads, bool wake) noexcept;

template <class Chunk>
int64_t run_with_team(int chunks, int threads, bool wake, Chunk chunk) noexcept {
  const auto body = [](void* context, int i) { (*static_cast<Chunk*>(context))(i); };
  return run_with_team({body, &chunk, chunks}, threads, wake);
}

// To be called in a forked child, which has none of its parent's threads: the next job starts a new
// team.
void forget_team() noexcept;

}  // namespace fused_adam
