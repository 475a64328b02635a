// A simple loop with the reads and writes of an Adam step, four streams in and three out, and one
// bitwise operation an element in place of arithmetic. Compiled by peers.py, measured like a peer.
#include <stdint.h>

#include <algorithm>

namespace {

__attribute__((target_clones("avx512f", "avx2", "default"))) void stream(
    uint32_t* __restrict p, const uint32_t* __restrict g, uint32_t* __restrict m,
    uint32_t* __restrict v, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t grad = g[i];
    p[i] ^= grad;
    m[i] ^= grad;
    v[i] ^= grad;
  }
}

}  // namespace

// Sizes in units of 4 bytes; as many threads as asked for, in one region over all arrays.
extern "C" void limit(int64_t arrays, uint32_t** p, uint32_t** g, uint32_t** m, uint32_t** v,
                      const int64_t* sizes, int threads) {
  int64_t total = 0;
  for (int64_t a = 0; a < arrays; ++a) total += sizes[a];
  const auto part = [&](int64_t first, int64_t last) {
    int64_t start = 0;
    for (int64_t a = 0; a < arrays && start < last; start += sizes[a++]) {
      const int64_t begin = std::max<int64_t>(first - start, 0);
      const int64_t end = std::min(last - start, sizes[a]);
      if (begin < end) stream(p[a], g[a], m[a], v[a], begin, end);
    }
  };
  if (threads == 1) return part(0, total);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    // Cut at cache lines, as the real step is.
    const auto bound = [&](int i) { return i == threads ? total : total / threads * i / 16 * 16; };
    part(bound(t), bound(t + 1));
  }
}
