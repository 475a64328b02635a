// The stored types: decoded to float32, which is exact, and encoded. To the nearest number, of two
// equally near ones to the even one; or dithered, to one of its two neighbours, on average to the
// number itself. Each is a few operations of simd/.
#pragma once

#include <string.h>

#include "../dither.hpp"
#include "lanes.hpp"

namespace fused_adam {
namespace {

template <class F>
struct Float16 {
  static F load(const uint16_t* p) { return F::load_float16(p); }
  static void store(uint16_t* p, F x) { store_float16(p, x); }
  static void store(uint16_t* p, F x, const uint32_t* net, typename F::Word word) {
    store_float16(p, x, net, word);
  }
};

template <class F>
struct BFloat16 {
  static F load(const uint16_t* p) { return F::load_bfloat16(p); }
  static void store(uint16_t* p, F x) { store_bfloat16(p, x); }
  static void store(uint16_t* p, F x, const uint32_t* net, typename F::Word word) {
    store_bfloat16(p, x, net, word);
  }
};

// The part of a dither that is alike in all blocks: its upper bits, as many as are added.
template <int bits>
struct Net {
  // Beyond the end of a block, so that a vector can be read at any element.
  alignas(64) uint32_t at[kBlock + 16] = {};
  constexpr Net() {
    for (uint32_t i = 0; i < kBlock + 16; ++i) at[i] = net_of(i % kBlock) >> (32 - bits);
  }
};
constexpr Net<16> kNet16;
constexpr Net<20> kNet20;

// --- Types of 16 bits ----------------------------------------------------------------------------

// The rest, less than a vector, goes by way of a buffer: only its own elements are touched.
template <class F, class Type>
void decode(const void* from, const uint8_t*, float* values, int64_t count) {
  const auto* const coded = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  for (; i + F::width <= count; i += F::width) store(values + i, Type::load(coded + i));
  if (i < count) {
    uint16_t rest[F::width] = {};
    memcpy(rest, coded + i, static_cast<size_t>(count - i) * sizeof(uint16_t));
    store_n(values + i, Type::load(rest), static_cast<int>(count - i));
  }
}

// store_vector(to, values, i): of the vector that begins with element i.
template <class F, class StoreVector>
inline void encode_vectors(const float* values, uint16_t* coded, int64_t count,
                           StoreVector store_vector) {
  int64_t i = 0;
  for (; i + F::width <= count; i += F::width) store_vector(coded + i, F::load(values + i), i);
  if (i < count) {
    uint16_t rest[F::width];
    store_vector(rest, F::load_n(values + i, static_cast<int>(count - i)), i);
    memcpy(coded + i, rest, static_cast<size_t>(count - i) * sizeof(uint16_t));
  }
}

template <class F, class Type>
void encode(const float* values, void* to, int64_t count) {
  encode_vectors<F>(values, static_cast<uint16_t*>(to), count,
                    [](uint16_t* p, F x, int64_t) { Type::store(p, x); });
}

template <class F, class Type>
void encode_dithered(const float* values, void* to, uint8_t*, int64_t first, int64_t count,
                     uint32_t dither) {
  auto* const coded = static_cast<uint16_t*>(to);
  for (int64_t i = 0, of_block; i < count; i += of_block) {
    const int64_t begin = (first + i) % kBlock;
    of_block = count - i < kBlock - begin ? count - i : kBlock - begin;
    const typename F::Word word(word_of(dither, first + i) >> 16);
    const uint32_t* const net = kNet16.at + begin;
    encode_vectors<F>(values + i, coded + i, of_block,
                      [&](uint16_t* p, F x, int64_t at) { Type::store(p, x, net + at, word); });
  }
}

// --- Types of 8 bits -----------------------------------------------------------------------------
//
// Of the bits of a float32, what is above a base, in units of 2**20: its exponent counted from that
// of the base, and three bits of its fraction. The base follows from the largest number of the
// block, which fits. What is below it: 0 (E4M3, of which one bit is the sign), or the base (E5M3:
// no square is taken for 0 but where all are). Both make a step smaller, never larger.
//
// An infinity or NaN stays one, and of the others those that are too small become as said.

template <class F>
struct E4M3 {
  static constexpr bool has_sign = true;
  static F load(const uint8_t* p, typename F::Word base) { return F::load_e4m3(p, base); }
  static F size(F x) { return magnitude(x); }
  static void store(uint8_t* p, const float* x, typename F::Word base, const uint32_t* net,
                    typename F::Word word) {
    F::store_e4m3(p, x, base, net, word);
  }
};

template <class F>
struct E5M3 {
  static constexpr bool has_sign = false;
  static F load(const uint8_t* p, typename F::Word base) { return F::load_e5m3(p, base); }
  static F size(F x) { return x; }
  static void store(uint8_t* p, const float* x, typename F::Word base, const uint32_t* net,
                    typename F::Word word) {
    F::store_e5m3(p, x, base, net, word);
  }
};

template <class Type>
inline uint32_t base_of(uint32_t exponent) {
  constexpr uint32_t kRange = Type::has_sign ? 15 : 31;
  return exponent < kRange ? 0 : (exponent - kRange) << 23;
}

// Of a block with an infinity, a NaN, or what is almost infinite; or where a square is negative,
// which no step makes.
template <class Type>
FUSED_ADAM_SELDOM void store_with_nonfinite(uint8_t* codes, const float* x, uint32_t base,
                                            const uint32_t* net, uint32_t word) {
  constexpr int32_t kMost = Type::has_sign ? 127 : 255;
  for (int i = 0; i < kBlock; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    const uint32_t size = bits & 0x7FFFFFFF, above = size + (net[i] ^ word) - base;
    const int32_t code = static_cast<int32_t>(above) >> 20;
    const uint32_t sign = Type::has_sign ? bits >> 24 & 0x80 : 0;
    codes[i] = static_cast<uint8_t>(size > 0x7F800000 ? kMost
                                    : code < 0        ? sign
                                                      : static_cast<uint32_t>(code) | sign);
  }
}

// The exponent that the largest number of a block asks for. The bits of one that has a sign, of
// which there is a NaN, too, are larger than those of all others.
inline uint32_t exponent_for(uint32_t largest_bits) {
  constexpr uint32_t kMost = 0x7F700000;
  return largest_bits > kMost ? 255 : (largest_bits + 0xFFFFF) >> 23;
}

template <class F, class Type>
FUSED_ADAM_SELDOM void encode_block(const float* x, uint8_t* codes, uint8_t* exponent,
                                    int64_t first, uint32_t dither) {
  F largest = Type::size(F::load(x));
  for (int i = F::width; i < kBlock; i += F::width) {
    largest = max_bits(largest, Type::size(F::load(x + i)));
  }
  const uint32_t of_block = exponent_for(largest_bits(largest)), base = base_of<Type>(of_block);
  const uint32_t word = word_of(dither, first) >> 12;
  *exponent = static_cast<uint8_t>(of_block);
  if (of_block == 255) return store_with_nonfinite<Type>(codes, x, base, kNet20.at, word);
  const typename F::Word all_base(base), all_word(word);
  for (int i = 0; i < kBlock; i += F::codes_at_once) {
    Type::store(codes + i, x + i, all_base, kNet20.at + i, all_word);
  }
}

// Both begin with a block. The last one, if it is not whole, goes by way of a buffer.
template <class F, class Type>
void decode_blocks(const void* from, const uint8_t* exponents, float* values, int64_t count) {
  const auto* codes = static_cast<const uint8_t*>(from);
  for (; count >= kBlock; count -= kBlock, codes += kBlock, values += kBlock) {
    const typename F::Word base(base_of<Type>(*exponents++));
    for (int i = 0; i < kBlock; i += F::width) store(values + i, Type::load(codes + i, base));
  }
  if (count > 0) {
    uint8_t rest[kBlock] = {};
    float decoded[kBlock];
    memcpy(rest, codes, static_cast<size_t>(count));
    decode_blocks<F, Type>(rest, exponents, decoded, kBlock);
    memcpy(values, decoded, static_cast<size_t>(count) * sizeof(float));
  }
}

template <class F, class Type>
void encode_blocks(const float* values, void* to, uint8_t* exponents, int64_t first, int64_t count,
                   uint32_t dither) {
  auto* codes = static_cast<uint8_t*>(to);
  for (; count >= kBlock; count -= kBlock, values += kBlock, codes += kBlock, first += kBlock) {
    encode_block<F, Type>(values, codes, exponents++, first, dither);
  }
  if (count > 0) {
    float rest[kBlock] = {};
    uint8_t coded[kBlock];
    memcpy(rest, values, static_cast<size_t>(count) * sizeof(float));
    encode_block<F, Type>(rest, coded, exponents, first, dither);
    memcpy(codes, coded, static_cast<size_t>(count));
  }
}

}  // namespace
}  // namespace fused_adam
