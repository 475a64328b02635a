// How a stage goes through its elements: whole vectors, then the first lanes of one.
#pragma once

#include "kernel.hpp"

// Where the compiler counts instructions and finds too many, a kernel would call a function for
// each vector, and keep in memory what it has in registers.
#if defined(_MSC_VER)
#define FUSED_ADAM_INLINE __forceinline
#define FUSED_ADAM_SELDOM __declspec(noinline)
#else
#define FUSED_ADAM_INLINE inline __attribute__((always_inline))
#define FUSED_ADAM_SELDOM __attribute__((noinline))
#endif

namespace fused_adam {
namespace {

template <class F>
struct WholeVector {
  using T = typename F::Scalar;
  F load(const T* p) const { return F::load(p); }
  void store(T* p, F x) const { fused_adam::store(p, x); }
};

template <class F>
struct FirstLanes {
  using T = typename F::Scalar;
  int n;
  F load(const T* p) const { return F::load_n(p, n); }
  void store(T* p, F x) const { fused_adam::store_n(p, x, n); }
};

// body(i, lanes) is the same code for both, so that a tail has the bits of a body.
template <class F, class Body>
inline void for_vectors(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + F::width <= count; i += F::width) body(i, WholeVector<F>{});
  if (i < count) body(i, FirstLanes<F>{static_cast<int>(count - i)});
}

template <class T>
inline T* stream(const Streams& streams, Stream which) {
  return static_cast<T*>(streams.at[which]);
}

template <class Set>
inline auto& of_type(const Set& all, float) {
  return all.f32;
}
template <class Set>
inline auto& of_type(const Set& all, double) {
  return all.f64;
}

}  // namespace
}  // namespace fused_adam
