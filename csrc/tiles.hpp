// Arrays are gone through tile by tile where more than one thing is done to them, or where they are
// decoded before and encoded after.
#pragma once

#include <stdint.h>

#include "kernel/kernel.hpp"
#include "stream_table.hpp"

namespace fused_adam {

// Elements that all stages of a step go through before the next ones: few enough for all streams to
// stay in the first-level cache meanwhile (6 of 8 bytes: 24 KiB). 1024 were as fast, in AVX2 and
// AVX-512; 2048 took 10 to 25 % longer with an average beyond the cache.
constexpr int64_t kTile = 512;

// On the stack: numbers that are decoded, or that the rule takes in the place of others.
struct alignas(64) Tile {
  char bytes[kTile * sizeof(double)];
};

// At most a tile of elements, as numbers that can be computed in: in this tile, if they are coded.
inline const void* decoded(const StageTable& table, DType dtype, const void* elements,
                           int64_t count, Tile& tile) noexcept {
  if (!is_coded(dtype)) return elements;
  table.decode[dtype - kComputed](elements, tile.bytes, count);
  return tile.bytes;
}

inline void encode(const StageTable& table, DType dtype, const void* numbers, void* elements,
                   int64_t count) noexcept {
  table.encode[dtype - kComputed](numbers, elements, count);
}

}  // namespace fused_adam
