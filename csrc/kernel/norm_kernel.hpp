// The stage that measures a gradient: sums of its squares, in double.
//
// The elements of all gradients, one after the other, fall into blocks, and those of a block into
// rows of a few lanes. Each lane of a block is summed in the order of its elements, so a sum does
// not depend on who computes it, on the ISA, or on how the elements are spread over arrays.
#pragma once

#include "lanes.hpp"

namespace fused_adam {
namespace {

template <class F64, int blocks, class T>
void add_rows(const T* grad, int64_t rows, double* lanes) {
  constexpr int vectors = kNormLanes / F64::width;
  F64 sums[blocks][vectors];
  for (int b = 0; b < blocks; ++b) {
    for (int v = 0; v < vectors; ++v) {
      sums[b][v] = F64::load(lanes + b * kNormLanes + v * F64::width);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int b = 0; b < blocks; ++b) {
      for (int v = 0; v < vectors; ++v) {
        const F64 x = F64::load(grad + b * kNormBlock + row * kNormLanes + v * F64::width);
        sums[b][v] = fma(x, x, sums[b][v]);
      }
    }
  }
  for (int b = 0; b < blocks; ++b) {
    for (int v = 0; v < vectors; ++v) {
      store(lanes + b * kNormLanes + v * F64::width, sums[b][v]);
    }
  }
}

template <class F64, class T>
void add_squares(const void* elements, int64_t position, int64_t count, double* lanes) {
  const T* grad = static_cast<const T*>(elements);
  while (count > 0) {
    double* const block = lanes + position / kNormBlock * kNormLanes;
    const int64_t within = position % kNormBlock;
    int64_t done = 1;
    if (within % kNormLanes != 0 || count < kNormLanes) {
      double* const lane = block + within % kNormLanes;
      const double x = *grad;
      const F64 first = F64::load_n(&x, 1);
      store_n(lane, fma(first, first, F64::load_n(lane, 1)), 1);
    } else if (within == 0 && count >= kBlocksAtOnce * kNormBlock) {
      add_rows<F64, kBlocksAtOnce>(grad, kNormBlock / kNormLanes, block);
      done = kBlocksAtOnce * kNormBlock;
    } else {
      const int64_t left = kNormBlock - within;
      const int64_t rows = (count < left ? count : left) / kNormLanes;
      add_rows<F64, 1>(grad, rows, block);
      done = rows * kNormLanes;
    }
    grad += done;
    position += done;
    count -= done;
  }
}

}  // namespace
}  // namespace fused_adam
