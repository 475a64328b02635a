// Two simple loops with the reads and writes of an Adam step, four streams in and three out. limit:
// one bitwise operation for each result, in place of arithmetic; what memory allows. divider_*: one
// root, one division and one difference; what the divider allows. Compiled by peers.py for the ISA
// at hand, measured like a peer.
#include <stdint.h>

#include <algorithm>
#include <cmath>

namespace {

struct Bits {
  using T = uint32_t;
  static void step(T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v,
                   int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T grad = g[i];
      p[i] ^= grad;
      m[i] ^= grad;
      v[i] ^= grad;
    }
  }
};

// Nothing grows or shrinks for long: v, which must begin above 0, tends to 1.
template <class Float>
struct Divider {
  using T = Float;
  static void step(T* __restrict p, const T* __restrict g, T* __restrict m, T* __restrict v,
                   int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T root = std::sqrt(v[i]);
      m[i] = p[i] - m[i];
      p[i] = g[i] / root;
      v[i] = root;
    }
  }
};

// As many threads as asked for, in one region over all arrays.
template <class Loop, class T = typename Loop::T>
void run(int64_t arrays, T** p, T** g, T** m, T** v, const int64_t* sizes, int threads) {
  int64_t total = 0;
  for (int64_t a = 0; a < arrays; ++a) total += sizes[a];
  const auto part = [&](int64_t first, int64_t last) {
    int64_t start = 0;
    for (int64_t a = 0; a < arrays && start < last; start += sizes[a++]) {
      const int64_t begin = std::max<int64_t>(first - start, 0);
      const int64_t end = std::min(last - start, sizes[a]);
      if (begin < end) Loop::step(p[a], g[a], m[a], v[a], begin, end);
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

}  // namespace

extern "C" {

// Sizes in units of 4 bytes.
void limit(int64_t arrays, uint32_t** p, uint32_t** g, uint32_t** m, uint32_t** v,
           const int64_t* sizes, int threads) {
  run<Bits>(arrays, p, g, m, v, sizes, threads);
}

void divider_float32(int64_t arrays, float** p, float** g, float** m, float** v,
                     const int64_t* sizes, int threads) {
  run<Divider<float>>(arrays, p, g, m, v, sizes, threads);
}

void divider_float64(int64_t arrays, double** p, double** g, double** m, double** v,
                     const int64_t* sizes, int threads) {
  run<Divider<double>>(arrays, p, g, m, v, sizes, threads);
}
}
