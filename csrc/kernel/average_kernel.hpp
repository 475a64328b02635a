// The stages that keep an average of a parameter, after its update:
//
//   ema = ema + (1 - ema_decay) * (param - ema)
//
// in two roundings, as PyTorch's lerp. It begins as a copy of param, before the first update.
#pragma once

#include "lanes.hpp"

namespace fused_adam {
namespace {

template <class F, bool from_param>
void average(const Streams& streams, int64_t count, typename F::Scalar narrowed) {
  using T = typename F::Scalar;
  const T* const param = stream<const T>(streams, kParam);
  T* const ema = stream<T>(streams, kEma);
  const F weight = F::broadcast(narrowed);
  for_vectors<F>(count, [&](int64_t i, auto lanes) {
    const F p = lanes.load(param + i), old = lanes.load(ema + i);
    lanes.store(ema + i, fma(weight, sub(p, old), from_param ? p : old));
  });
}

template <class F>
void average_stage(const Streams& streams, int64_t count, const CoefficientSet& all) {
  const auto& k = of_type(all, typename F::Scalar());
  (k.ema_from_param ? average<F, true> : average<F, false>)(streams, count, k.ema_weight);
}

template <class F>
void begin_average_stage(const Streams& streams, int64_t count, const CoefficientSet&) {
  using T = typename F::Scalar;
  const T* const param = stream<const T>(streams, kParam);
  T* const ema = stream<T>(streams, kEma);
  for_vectors<F>(count,
                 [&](int64_t i, auto lanes) { lanes.store(ema + i, lanes.load(param + i)); });
}

}  // namespace
}  // namespace fused_adam
