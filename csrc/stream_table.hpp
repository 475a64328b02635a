// What belongs to a parameter: a row for each stream of memory. Everything that deals with streams
// walks this table: allocation, checks, the state that users see, checkpoints, tests.
#pragma once

#include <stdint.h>

#include "coefficients.hpp"
#include "streams.hpp"

namespace fused_adam {

enum class Access {
  kRead,     // the gradient; it is set to zeros, too, in a step that is asked to
  kUpdated,  // read and written
};

// What a stream begins as.
enum class Initial {
  kCallers,      // an array of the caller
  kZeros,        // an array of ours, as the next
  kCopyOfParam,  // as it is when the first step begins that has this stream
};

struct StreamInfo {
  Stream stream;
  const char* name;  // in state, checkpoints, arguments and messages
  Access access;
  Initial initial;
  int elements_per_entry;  // of param; 1, or kBlock
  int page_offset;         // where a large array begins in a page, counted from param's beginning
  int format;              // the first one of checkpoint files that has it
  const char* option;      // the one that asks for it; null where every step needs it
  bool (*wanted)(const HyperParameters&);  // is it asked for?
  bool coded_only;                         // only params that are coded have it
};

constexpr bool always(const HyperParameters&) { return true; }
constexpr bool with_amsgrad(const HyperParameters& hyper) { return hyper.amsgrad; }
constexpr bool with_ema(const HyperParameters& hyper) { return hyper.keeps_ema(); }
constexpr bool with_masters(const HyperParameters& hyper) { return hyper.master_weights; }
constexpr bool with_scales(const HyperParameters& hyper) {
  return hyper.state_dtype == HyperParameters::kStateFloat8;
}

// clang-format off
constexpr StreamInfo kStreamTable[kStreams] = {
    {kParam,            "param",                Access::kUpdated, Initial::kCallers,     1,         0, 1, nullptr,          always,       false},
    {kGrad,             "grad",                 Access::kRead,    Initial::kCallers,     1,      2560, 1, nullptr,          always,       false},
    {kExpAvg,           "exp_avg",              Access::kUpdated, Initial::kZeros,       1,      1024, 1, nullptr,          always,       false},
    {kExpAvgSq,         "exp_avg_sq",           Access::kUpdated, Initial::kZeros,       1,      2048, 1, nullptr,          always,       false},
    {kMaxExpAvgSq,      "max_exp_avg_sq",       Access::kUpdated, Initial::kZeros,       1,      3072, 1, "amsgrad",        with_amsgrad, false},
    {kEma,              "ema",                  Access::kUpdated, Initial::kCopyOfParam, 1,       512, 2, "ema_decay",      with_ema,     false},
    {kMasterParam,      "master_param",         Access::kUpdated, Initial::kCopyOfParam, 1,      1536, 2, "master_weights", with_masters, true},
    {kExpAvgScale,      "exp_avg_scale",        Access::kUpdated, Initial::kZeros,       kBlock, 3584, 2, "state_dtype",    with_scales,  false},
    {kExpAvgSqScale,    "exp_avg_sq_scale",     Access::kUpdated, Initial::kZeros,       kBlock,  256, 2, "state_dtype",    with_scales,  false},
};
// clang-format on

constexpr bool table_is_in_order() {
  for (int i = 0; i < kStreams; ++i) {
    if (kStreamTable[i].stream != i) return false;
  }
  return true;
}
static_assert(table_is_in_order(), "kStreamTable is indexed by Stream");

constexpr bool is_ours(const StreamInfo& info) { return info.initial != Initial::kCallers; }

// These have no default: what is forgotten in them does not compile (-Werror=switch).

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case kFloat32:
      return 4;
    case kFloat64:
      return 8;
    case kFloat16:
    case kBFloat16:
      return 2;
    case kE4M3:
    case kE5M3:
    case kExponent:
      return 1;
  }
  return 0;
}

// What elements of a type are computed in.
constexpr DType computed_in(DType stored) {
  switch (stored) {
    case kFloat64:
      return kFloat64;
    case kFloat32:
    case kFloat16:
    case kBFloat16:
    case kE4M3:
    case kE5M3:
      return kFloat32;
    case kExponent:  // of others, and nothing that is computed with
      return kExponent;
  }
  return stored;
}
constexpr bool is_coded(DType stored) { return computed_in(stored) != stored; }
// In blocks that share an exponent. They are cut, and lie in memory, by these.
constexpr bool is_in_blocks(DType stored) { return stored == kE4M3 || stored == kE5M3; }

// The streams of ours that steps with these options need, for one type of param or another: a bit
// for each. Once a group, and not for each of its arrays, which took 8 us of 1000.
inline unsigned wanted_streams(const HyperParameters& hyper) {
  unsigned wanted = 0;
  for (const StreamInfo& info : kStreamTable) {
    if (is_ours(info) && info.wanted(hyper)) wanted |= 1u << info.stream;
  }
  return wanted;
}

constexpr unsigned streams_of_coded_only() {
  unsigned streams = 0;
  for (const StreamInfo& info : kStreamTable) streams |= unsigned{info.coded_only} << info.stream;
  return streams;
}

// Of these, those that a param of that type needs.
constexpr unsigned streams_for(DType param, unsigned wanted) {
  constexpr unsigned kOfCodedOnly = streams_of_coded_only();
  return is_coded(param) ? wanted : wanted & ~kOfCodedOnly;
}

// Those that begin as copies of param: a bit for each.
constexpr unsigned copies_of_param() {
  unsigned copies = 0;
  for (const StreamInfo& info : kStreamTable) {
    if (info.initial == Initial::kCopyOfParam) copies |= 1u << info.stream;
  }
  return copies;
}

// How a parameter and what belongs to it are stored.
struct Storage {
  DType param;
  HyperParameters::StateDType state;  // only where param is computed in float32; else kFull
};

// The codings of moments, by what was asked for.
constexpr DType moment_dtype(const Storage& storage, DType in_8_bits) {
  switch (storage.state) {
    case HyperParameters::kFull:
      return computed_in(storage.param);
    case HyperParameters::kStateBFloat16:
      return kBFloat16;
    case HyperParameters::kStateFloat8:
      return in_8_bits;
  }
  return storage.param;
}

// What the entries of a stream of ours are stored as: a gradient of the caller may be stored as
// param is, too.
constexpr DType dtype_of(Stream stream, const Storage& storage) {
  switch (stream) {
    case kParam:
      return storage.param;
    case kExpAvg:
      return moment_dtype(storage, kE4M3);
    case kExpAvgSq:
    case kMaxExpAvgSq:
      return moment_dtype(storage, kE5M3);
    case kExpAvgScale:
    case kExpAvgSqScale:
      return kExponent;
    case kGrad:  // what is added up in 16 bits over many micro-batches stands still
    case kEma:   // likewise
    case kMasterParam:
      return computed_in(storage.param);
  }
  return storage.param;
}

// Of a moment that is in blocks (the largest one never is: see options.cpp): the stream of their
// exponents.
constexpr Stream scale_of(Stream moment) {
  switch (moment) {
    case kExpAvg:
      return kExpAvgScale;
    case kExpAvgSq:
      return kExpAvgSqScale;
    default:
      return moment;
  }
}
// Has it the shape of param? What is in blocks has not: they are of neighbours in memory.
constexpr bool is_like_param(Stream stream, const Storage& storage) {
  return kStreamTable[stream].elements_per_entry == 1 && !is_in_blocks(dtype_of(stream, storage));
}

constexpr int64_t entries_of(Stream stream, int64_t elements) {
  return kStreamTable[stream].elements_per_entry == 1 ? elements : (elements + kBlock - 1) / kBlock;
}

// The bytes of a stream that belong to so many elements.
constexpr int64_t bytes_of(Stream stream, const Storage& storage, int64_t elements) {
  return entries_of(stream, elements) * size_of(dtype_of(stream, storage));
}

}  // namespace fused_adam
