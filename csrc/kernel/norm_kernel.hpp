// The stage that measures a gradient: sums of its squares, in double.
//
// The elements of all gradients, one after the other, fall into blocks, and those of a block into
// rows of a few lanes. Each lane of a block is summed in the order of its elements, so a sum does
// not depend on who computes it, on the ISA, or on how the elements are spread over arrays.
#pragma once

#include "lanes.hpp"

namespace fused_adam {
namespace {

// To read at four places in turn, blocks apart, was slower (0.17 ns an element and 0.13, Zen 4, one
// thread, beyond the cache), and to prefetch no faster.
template <class F64, class T>
void add_rows(const T* grad, int64_t rows, double* lanes) {
  constexpr int vectors = kNormLanes / F64::width;
  F64 sums[vectors];
  for (int v = 0; v < vectors; ++v) sums[v] = F64::load(lanes + v * F64::width);
  for (int64_t row = 0; row < rows; ++row) {
    for (int v = 0; v < vectors; ++v) {
      const F64 x = F64::load(grad + row * kNormLanes + v * F64::width);
      sums[v] = fma(x, x, sums[v]);
    }
  }
  for (int v = 0; v < vectors; ++v) store(lanes + v * F64::width, sums[v]);
}

template <class F64, class T>
void add_squares(const void* elements, int64_t position, int64_t count, double* lanes) {
  const T* grad = static_cast<const T*>(elements);
  while (count > 0) {
    int64_t done = 1;
    if (position % kNormLanes != 0 || count < kNormLanes) {
      double* const lane = lanes + position % kNormLanes;
      const double x = *grad;
      const F64 first = F64::load_n(&x, 1);
      store_n(lane, fma(first, first, F64::load_n(lane, 1)), 1);
    } else {
      const int64_t rows = count / kNormLanes;
      add_rows<F64>(grad, rows, lanes);
      done = rows * kNormLanes;
    }
    grad += done;
    position += done;
    count -= done;
  }
}

}  // namespace
}  // namespace fused_adam
