#include "step.hpp"

#include <algorithm>

#include "float_mode.hpp"
#include "parallel.hpp"
#include "stream_table.hpp"

namespace fused_adam {
namespace {

// Work is cut at multiples of a cache line of param: no two threads write to the same line of an
// aligned array, and a float64 element counts twice a float32 one, as it does for memory.
constexpr int64_t kLineBytes = 64;

// In bytes: to divide by the elements of a line, which the compiler does not know, took a tenth of
// the time of 1000 small arrays.
int64_t lines_of(DType dtype, int64_t elements) {
  return (elements * size_of(dtype) + kLineBytes - 1) / kLineBytes;
}

struct ElementsPerLine {
  int64_t of[kDTypes] = {};
  constexpr ElementsPerLine() {
    for (int i = 0; i < kDTypes; ++i) of[i] = kLineBytes / size_of(static_cast<DType>(i));
  }
};
constexpr ElementsPerLine kElementsPerLine;

// Elements that all stages of a step go through before the next ones: few enough for all streams to
// stay in the first-level cache meanwhile (6 of 8 bytes: 24 KiB). 1024 were as fast, in AVX2 and
// AVX-512; 2048 took 10 to 25 % longer with an average beyond the cache.
constexpr int64_t kTile = 512;

// The streams from this element of param on.
Streams from_element(const Streams& streams, DType dtype, int64_t first) {
  Streams piece = {};
  for (int i = 0; i < kStreams; ++i) {
    if (streams.at[i] == nullptr) continue;
    const auto stream = static_cast<Stream>(i);
    piece.at[i] = static_cast<char*>(streams.at[i]) + bytes_of(stream, dtype, first);
  }
  return piece;
}

}  // namespace

void StepPlan::begin(bool zero_grad) {
  arrays_.clear();
  rules_.clear();
  zero_grad_ = zero_grad;
}

void StepPlan::set_rule(const HyperParameters& hyper, int64_t step) {
  const bool l2 = !hyper.decoupled_weight_decay && hyper.weight_decay != 0.0;
  rules_.push_back({coefficients(hyper, step), l2, hyper.amsgrad, hyper.keeps_ema()});
}

void StepPlan::add_array(const Streams& streams, int64_t size, DType dtype, bool begins_ema) {
  if (size == 0) return;
  const int64_t lines_before = arrays_.empty() ? 0 : arrays_.back().line_end;
  const int64_t lines = lines_of(dtype, size);
  const auto rule = static_cast<uint32_t>(rules_.size() - 1);
  arrays_.push_back({streams, size, lines_before + lines, rule, dtype, begins_ema});
}

void StepPlan::run(const StageTable& table, const Threads& threads) noexcept {
  if (arrays_.empty()) return;
  const int64_t lines = arrays_.back().line_end;
  for_lines(lines, threads, [&](int64_t begin, int64_t end) { run_lines(table, begin, end); });
}

void StepPlan::run_lines(const StageTable& table, int64_t begin, int64_t end) const noexcept {
  const DefaultFloatMode mode;
  auto array =
      std::upper_bound(arrays_.begin(), arrays_.end(), begin,
                       [](int64_t line, const ArrayUpdate& a) { return line < a.line_end; });
  int64_t line_begin = array == arrays_.begin() ? 0 : (array - 1)->line_end;
  for (; array != arrays_.end() && line_begin < end; line_begin = array->line_end, ++array) {
    const int64_t per_line = kElementsPerLine.of[array->dtype];
    const int64_t first = std::max<int64_t>(begin - line_begin, 0) * per_line;
    const int64_t last = std::min((end - line_begin) * per_line, array->size);
    run_slice(*array, table, first, last);
  }
}

StepPlan::Stages StepPlan::stages_of(const ArrayUpdate& array,
                                     const StageTable& table) const noexcept {
  const Rule& rule = rules_[array.rule];
  Stages stages;
  if (array.begins_ema) stages.add(table.begin_average[array.dtype]);
  stages.add(table.adam[array.dtype][rule.l2][rule.amsgrad]);
  if (rule.ema) stages.add(table.average[array.dtype]);
  if (zero_grad_) stages.add(table.clear_grad[array.dtype]);
  return stages;
}

void StepPlan::run_slice(const ArrayUpdate& array, const StageTable& table, int64_t first,
                         int64_t last) const noexcept {
  const Stages stages = stages_of(array, table);
  const CoefficientSet& k = rules_[array.rule].coefficients;
  // The rule alone needs no tiles.
  const int64_t tile = stages.count == 1 ? last - first : kTile;
  for (int64_t begin = first; begin < last; begin += tile) {
    const int64_t count = std::min(tile, last - begin);
    const Streams piece =
        begin == 0 ? array.streams : from_element(array.streams, array.dtype, begin);
    for (int i = 0; i < stages.count; ++i) stages.at[i](piece, count, k);
  }
}

}  // namespace fused_adam
