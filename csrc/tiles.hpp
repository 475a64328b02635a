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
static_assert(kTile % kBlock == 0, "a tile is made of whole blocks");

// On the stack: numbers that are decoded, or that the rule takes in the place of others.
struct alignas(64) Tile {
  char bytes[kTile * sizeof(double)];
};

// Any number of elements. exponents: of their blocks, where they are in such.
inline void decode(const StageTable& table, DType dtype, const void* elements,
                   const void* exponents, void* numbers, int64_t count) noexcept {
  table.decode[dtype - kComputed](elements, static_cast<const uint8_t*>(exponents),
                                  static_cast<float*>(numbers), count);
}
inline void encode(const StageTable& table, DType dtype, const void* numbers, void* elements,
                   int64_t count) noexcept {
  table.encode[dtype - kComputed](static_cast<const float*>(numbers), elements, count);
}
// first: the number of the first element in its array.
inline void encode(const StageTable& table, DType dtype, const void* numbers, void* elements,
                   void* exponents, int64_t first, int64_t count, uint32_t dither) noexcept {
  table.encode_dithered[dtype - kComputed](static_cast<const float*>(numbers), elements,
                                           static_cast<uint8_t*>(exponents), first, count, dither);
}

// At most a tile of elements, as numbers that can be computed in: in this tile, if they are coded.
inline const void* decoded(const StageTable& table, DType dtype, const void* elements,
                           int64_t count, Tile& tile) noexcept {
  if (!is_coded(dtype)) return elements;
  decode(table, dtype, elements, nullptr, tile.bytes, count);
  return tile.bytes;
}

}  // namespace fused_adam
