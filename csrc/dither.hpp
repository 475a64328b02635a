// What is added before bits are cut off, so that on average nothing is lost: a number for each
// element, step and key, and no state. Whoever computes an element, in whatever order, gets its
// own.
//
// Over the 128 elements of a block the numbers are a shuffled net: each 128th of their range has
// one of them, and so has each 256th of those of an element over 256 steps. Sums stay closer to
// what they should be than by chance. (A golden-ratio sequence over steps resonated with gradients
// that repeat; this net did not.)
//
//   number = reversed bits of (element % 128)  ^  hash of (element / 128)  ^  word of the step
//
// and of it as many bits as are needed, from the top.
#pragma once

#include <stdint.h>

#include "streams.hpp"

namespace fused_adam {

// Of one step and whatever shares its numbers.
struct Dither {
  uint32_t key, word;
};

namespace {  // kernel files include it

// The finalizer of MurmurHash3, by A. Appleby.
constexpr uint32_t hash32(uint32_t x) {
  x = (x ^ x >> 16) * 0x85EBCA6B;
  x = (x ^ x >> 13) * 0xC2B2AE35;
  return x ^ x >> 16;
}

constexpr uint32_t reversed(uint32_t x) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (x >> i & 1u) << (31 - i);
  return bits;
}

inline Dither dither_of(uint32_t key, int64_t step) {
  const uint32_t own = hash32(~key), epoch = static_cast<uint32_t>(step >> 8);
  const uint32_t top = reversed(static_cast<uint32_t>(step & 255)) ^ hash32(epoch ^ own);
  const uint32_t rest = hash32(static_cast<uint32_t>(step) + own);
  return {key, (top & 0xFF000000) | (rest & 0x00FFFFFF)};
}

// Of the moment that is so many streams after kExpAvg.
inline Dither moment_dither(uint32_t moment, int64_t step) {
  return dither_of(hash32(1 + moment), step);
}

// Of the block of elements that this one begins.
constexpr uint32_t word_of(const Dither& dither, int64_t first) {
  return hash32(static_cast<uint32_t>(first / kBlock) ^ dither.key) ^ dither.word;
}

// Of parameters by their number.
constexpr uint32_t dither_key(uint64_t seed, uint32_t number) {
  const uint32_t low = hash32(static_cast<uint32_t>(seed) + 0x9E3779B9);
  return hash32(hash32(low ^ static_cast<uint32_t>(seed >> 32)) + number);
}

}  // namespace
}  // namespace fused_adam
