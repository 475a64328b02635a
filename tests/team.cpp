// Hammers the team with small jobs: every chunk runs exactly once, helpers that sleep are woken,
// and nothing of it inside an OpenMP region or right after a stall. Ends with 0, with 1 and a line
// that says what went wrong, or with SIGALRM where something waits for ever. .ci/sanitize runs it.
#include "../csrc/team.hpp"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "../csrc/parallel.hpp"
#include "../csrc/stall_watch.hpp"

using namespace fused_adam;
using std::chrono::microseconds;

namespace {

constexpr unsigned kPatience = 300;  // seconds for all of it, on a machine that others keep busy

void require(bool condition, const char* what) {
  if (condition) return;
  printf("WRONG: %s\n", what);
  exit(1);
}

void spin(microseconds time) {
  const auto end = std::chrono::steady_clock::now() + time;
  while (std::chrono::steady_clock::now() < end) {
  }
}

// Jobs so small that helpers come late, while the next one is under way: a chunk that is claimed
// for the wrong job would run twice, or never.
void every_chunk_once(int most_threads, int jobs) {
  std::vector<int> runs(kMaxChunks);  // written by one thread at a time, or the sanitizer says so
  uint32_t seed = 1;
  for (int job = 0; job < jobs; ++job) {
    seed = seed * 1664525 + 1013904223;
    const int chunks = 2 + static_cast<int>(seed >> 24) % 100;
    const int threads = 2 + static_cast<int>(seed >> 16) % (most_threads - 1);
    run_with_team(chunks, threads, job % 16 != 0, [&](int i) { ++runs[static_cast<size_t>(i)]; });
    for (int i = 0; i < chunks; ++i) {
      require(runs[static_cast<size_t>(i)] == 1, "a chunk did not run exactly once");
      runs[static_cast<size_t>(i)] = 0;
    }
  }
}

// Jobs that end only when all threads are in them, some of them begun when a helper is just about
// to sleep: a wake-up that is lost leaves the others waiting.
void sleepers_are_woken(int threads, int jobs) {
  for (int job = 0; job < jobs; ++job) {
    std::atomic<int> inside{0};
    run_with_team(threads, threads, true, [&](int) {
      ++inside;
      while (inside < threads) std::this_thread::yield();
    });
    spin(microseconds(job % 8 == 0 ? 500 : 30 + job % 41));
  }
}

// How many threads a step has that large.
int threads_of_a_step(Threads::BackEnd back_end, void (*in_chunk)(bool is_caller)) {
  const auto caller = std::this_thread::get_id();
  std::atomic<int> others{0}, calls{0};
  for_lines(1 << 18, {back_end, 2}, [&](int64_t, int64_t) {
    const bool is_caller = std::this_thread::get_id() == caller;
    ++calls;
    if (!is_caller) ++others;
    in_chunk(is_caller);
  });
  require(calls == 1 || calls > 2, "a step is cut into chunks, or not at all");
  return calls == 1 ? 1 : others > 0 ? 2 : 0;  // 0: the helper came too late
}

void alone_after_a_stall() {
  const auto unhurried = [](bool) { spin(microseconds(50)); };
  const auto stalls = [](bool is_caller) {
    spin(microseconds(50));
    if (!is_caller) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  };
  int threads = 0;
  while (threads != 2) {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));  // an accidental stall passes
    threads = threads_of_a_step(Threads::kTeam, stalls);
  }
  require(threads_of_a_step(Threads::kTeam, unhurried) == 1, "a step after a stall has helpers");
}

void alone_in_a_region() {
#if defined(_OPENMP)
  for (const auto back_end : {Threads::kTeam, Threads::kOpenMP}) {
    std::atomic<int> helped{0};
#pragma omp parallel num_threads(2)
    if (threads_of_a_step(back_end, [](bool) { spin(microseconds(50)); }) != 1) ++helped;
    require(helped == 0, "a step inside an OpenMP region has helpers");
  }
#endif
}

// How long steps stay alone, by a clock of our own.
void pauses_of_the_watch() {
  constexpr int64_t kMs = 1'000'000;
  StallWatch watch;
  int64_t now = 1000 * kMs;
  // A step with helpers that takes so long, of which they were waited for so long.
  const auto step = [&](int64_t waited, int64_t takes) {
    require(watch.calm(now), "a step with helpers while others want the CPUs");
    watch.report(waited, now, now + takes);
    now += takes;
  };
  const auto pause = [&] {
    const int64_t begin = now;
    while (!watch.calm(now)) now += kMs / 8;
    return (now - begin) / kMs;
  };
  const auto many_steps = [&] {
    for (int i = 0; i < 1000; ++i) step(kMs / 100, kMs);
  };
  require(pause() == 0, "a pause before any step");
  many_steps();
  step(kMs / 4, 2 * kMs);    // an eighth of its time is no stall
  step(kMs / 20, kMs / 16);  // nor is 50 us
  require(pause() == 0, "a pause without a stall");
  step(2 * kMs, 3 * kMs);
  require(pause() == 32, "the pause after a stall is not 16 times as long");
  many_steps();
  step(2 * kMs, 3 * kMs);
  require(pause() == 32, "a stall after a long time counts as another one");
  step(2 * kMs, 3 * kMs);
  require(pause() == 64, "a stall at once does not double the pause");
  step(10 * kMs, 11 * kMs);
  require(pause() == 160, "a longer stall has no longer pause");
  for (int i = 0; i < 10; ++i) {
    step(2 * kMs, 3 * kMs);
    pause();
  }
  step(2 * kMs, 3 * kMs);
  require(pause() == 4000, "the longest pause is not 4 s");
  many_steps();
  step(2 * kMs, 3 * kMs);
  require(pause() == 32, "helpers do not come back");
}

}  // namespace

int main() {
  alarm(kPatience);
  alone_in_a_region();
  sleepers_are_woken(2, 20'000);
  sleepers_are_woken(7, 500);
  every_chunk_once(2, 300'000);
  every_chunk_once(6, 30'000);
  alone_after_a_stall();
  pauses_of_the_watch();
  puts("team: as expected");
}
