// Stored types of 16 bits: decoded to float32, which is exact, and encoded, to the nearest, of two
// equally near ones to the even one. Each is a pair of operations of simd/.
#pragma once

#include <string.h>

#include "lanes.hpp"

namespace fused_adam {
namespace {

template <class F>
struct Float16 {
  static F load(const uint16_t* p) { return F::load_float16(p); }
  static void store(uint16_t* p, F x) { store_float16(p, x); }
};

template <class F>
struct BFloat16 {
  static F load(const uint16_t* p) { return F::load_bfloat16(p); }
  static void store(uint16_t* p, F x) { store_bfloat16(p, x); }
};

// The rest, less than a vector, goes by way of a buffer: only its own elements are touched.
template <class F, class Type>
void decode(const void* from, void* to, int64_t count) {
  const auto* const coded = static_cast<const uint16_t*>(from);
  float* const values = static_cast<float*>(to);
  int64_t i = 0;
  for (; i + F::width <= count; i += F::width) store(values + i, Type::load(coded + i));
  if (i < count) {
    uint16_t rest[F::width] = {};
    memcpy(rest, coded + i, static_cast<size_t>(count - i) * sizeof(uint16_t));
    store_n(values + i, Type::load(rest), static_cast<int>(count - i));
  }
}

template <class F, class Type>
void encode(const void* from, void* to, int64_t count) {
  const float* const values = static_cast<const float*>(from);
  auto* const coded = static_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + F::width <= count; i += F::width) Type::store(coded + i, F::load(values + i));
  if (i < count) {
    uint16_t rest[F::width];
    Type::store(rest, F::load_n(values + i, static_cast<int>(count - i)));
    memcpy(coded + i, rest, static_cast<size_t>(count - i) * sizeof(uint16_t));
  }
}

}  // namespace
}  // namespace fused_adam
