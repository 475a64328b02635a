#include "step.hpp"

#include <string.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "slices.hpp"
#include "tiles.hpp"

namespace fused_adam {
namespace {

// Unscaled and clipped. grad may be in that tile already. dtype: computed in.
const void* scaled(const StageTable& table, DType dtype, const GradCoefficientSet& all,
                   const void* grad, int64_t count, Tile& tile) noexcept {
  const bool divides = dtype == kFloat32 ? all.f32.divides : all.f64.divides;
  table.scale_grad[dtype][divides](grad, tile.bytes, count, all);
  return tile.bytes;
}

void clear(const StageTable& table, DType dtype, void* grad, int64_t count) noexcept {
  if (is_coded(dtype)) {
    memset(grad, 0, static_cast<size_t>(count * size_of(dtype)));
  } else {
    table.clear_grad[dtype](grad, count);
  }
}

// In an order that depends on their number alone: each with its neighbour, until one is left.
double sum_of_pairs(double* sums, size_t count) noexcept {
  for (; count > 1; count = (count + 1) / 2) {
    for (size_t i = 0; i < count / 2; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
    if (count % 2 != 0) sums[count / 2] = sums[count - 1];
  }
  return count == 0 ? 0.0 : sums[0];
}

}  // namespace

// --- The plan ----------------------------------------------------------------------------------

void StepWishes::add(const HyperParameters& hyper) {
  measures |= hyper.measures();
  skips_nonfinite |= hyper.skip_nonfinite;
}

void StepPlan::begin(const StepWishes& wishes) {
  arrays_.clear();
  rules_.clear();
  wishes_ = wishes;
}

void StepPlan::set_rule(const HyperParameters& hyper, int64_t step) {
  const bool l2 = !hyper.decoupled_weight_decay && hyper.weight_decay != 0.0;
  rules_.push_back({coefficients(hyper, step),
                    hyper.max_norm,
                    hyper.clip_value,
                    l2,
                    hyper.amsgrad,
                    hyper.keeps_ema(),
                    hyper.master_weights,
                    {},
                    {}});
}

void StepPlan::add_array(const Streams& streams, int64_t size, DType dtype, DType grad_dtype,
                         unsigned begins) {
  if (size == 0) return;
  int64_t line_end = lines_of(dtype, size), element_end = size;
  if (!arrays_.empty()) {
    line_end += arrays_.back().line_end;
    element_end += arrays_.back().element_end;
  }
  const auto rule = static_cast<uint32_t>(rules_.size() - 1);
  arrays_.push_back({streams, size, line_end, element_end, rule, dtype, grad_dtype, begins});
}

void StepPlan::end() {
  if (!wishes_.measures || arrays_.empty()) return;
  const int64_t blocks = (arrays_.back().element_end + kNormBlock - 1) / kNormBlock;
  sums_.resize(static_cast<size_t>(blocks));
}

StepReport StepPlan::measure(const StageTable& table, const Threads& threads) noexcept {
  StepReport report;
  if (!wishes_.measures) return report;
  bool finite = true;
  report.measured = true;
  if (!arrays_.empty()) report.grad_norm = norm(table, threads, finite);
  report.skipped = wishes_.skips_nonfinite && !finite;
  return report;
}

void StepPlan::run(const StageTable& table, const Threads& threads,
                   const StepReport& report) noexcept {
  if (report.skipped) {
    if (wishes_.zero_grad) clear_grads(table, threads);
    return;
  }
  prepare_grads(report.grad_norm);
  for_slices(arrays_, threads, [&](const ArrayUpdate& array, int64_t first, int64_t last) {
    run_slice(array, table, first, last);
  });
}

// --- The pass that updates ---------------------------------------------------------------------

void StepPlan::prepare_grads(double grad_norm) noexcept {
  constexpr double kNoBound = std::numeric_limits<double>::infinity();
  for (Rule& rule : rules_) {
    if (wishes_.grad_scale == 1.0 && rule.max_norm < 0.0 && rule.clip_value < 0.0) continue;
    const double clip = rule.max_norm >= 0.0 ? clip_coefficient(rule.max_norm, grad_norm) : 1.0;
    const double bound = rule.clip_value >= 0.0 ? rule.clip_value : kNoBound;
    rule.grad = grad_coefficients(wishes_.grad_scale, clip, bound);
    rule.scales_grad[kFloat32] = !rule.grad.f32.do_nothing();
    rule.scales_grad[kFloat64] = !rule.grad.f64.do_nothing();
  }
}

StepPlan::Stages StepPlan::stages_of(const ArrayUpdate& array,
                                     const StageTable& table) const noexcept {
  const Rule& rule = rules_[array.rule];
  const DType computed = computed_in(array.dtype);
  Stages stages;
  if ((array.begins >> kEma & 1u) != 0) stages.add(table.begin_average[computed]);
  stages.add(table.adam[computed][rule.l2][rule.amsgrad]);
  if (rule.ema) stages.add(table.average[computed]);
  return stages;
}

// The streams from this element of param on.
Streams StepPlan::piece_of(const ArrayUpdate& array, int64_t first) noexcept {
  if (first == 0) return array.streams;
  Streams piece = {};
  for (int i = 0; i < kStreams; ++i) {
    if (array.streams.at[i] == nullptr) continue;
    const auto stream = static_cast<Stream>(i);
    const int64_t offset =
        stream == kGrad ? first * size_of(array.grad_dtype) : bytes_of(stream, array.dtype, first);
    piece.at[i] = static_cast<char*>(array.streams.at[i]) + offset;
  }
  return piece;
}

void StepPlan::run_slice(const ArrayUpdate& array, const StageTable& table, int64_t first,
                         int64_t last) const noexcept {
  const Stages stages = stages_of(array, table);
  const Rule& rule = rules_[array.rule];
  const bool coded = is_coded(array.dtype) || is_coded(array.grad_dtype);
  // The rule alone needs no tiles.
  if (stages.count == 1 && !coded && !rule.scales_grad[array.dtype] && !wishes_.zero_grad) {
    stages.at[0](piece_of(array, first), last - first, rule.coefficients);
  } else {
    run_tiles(array, stages, table, first, last);
  }
}

void StepPlan::run_tiles(const ArrayUpdate& array, const Stages& stages, const StageTable& table,
                         int64_t first, int64_t last) const noexcept {
  const Rule& rule = rules_[array.rule];
  const DType computed = computed_in(array.dtype);
  Tile grad_tile, param_tile;
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t count = std::min(kTile, last - begin);
    Streams piece = piece_of(array, begin);
    void* const param = piece.at[kParam];
    void* const grad = piece.at[kGrad];
    const void* taken = decoded(table, array.grad_dtype, grad, count, grad_tile);
    if (rule.scales_grad[computed]) {
      taken = scaled(table, computed, rule.grad, taken, count, grad_tile);
    }
    piece.at[kGrad] = const_cast<void*>(taken);  // which no stage writes
    if (is_coded(array.dtype)) {
      piece.at[kParam] = rule.masters ? piece.at[kMasterParam] : param_tile.bytes;
      if (!rule.masters || (array.begins >> kMasterParam & 1u) != 0) {
        table.decode[array.dtype - kComputed](param, piece.at[kParam], count);
      }
    }
    for (int i = 0; i < stages.count; ++i) stages.at[i](piece, count, rule.coefficients);
    if (is_coded(array.dtype)) encode(table, array.dtype, piece.at[kParam], param, count);
    if (wishes_.zero_grad) clear(table, array.grad_dtype, grad, count);
  }
}

void StepPlan::clear_grads(const StageTable& table, const Threads& threads) const noexcept {
  for_slices(arrays_, threads, [&](const ArrayUpdate& array, int64_t first, int64_t last) {
    void* const grad = element_at(array.streams.at[kGrad], array.grad_dtype, first);
    clear(table, array.grad_dtype, grad, last - first);
  });
}

// --- The pass that measures --------------------------------------------------------------------

// Of the unscaled gradients. Squares of float64 numbers may overflow or vanish where the norm does
// not: then once more, with numbers that are smaller or larger by a power of two.
double StepPlan::norm(const StageTable& table, const Threads& threads, bool& finite) noexcept {
  const DefaultFloatMode mode;
  const double sum = sum_of_squares(table, threads, 1.0);
  finite = std::isfinite(sum);
  const bool all_float32 = std::all_of(arrays_.begin(), arrays_.end(), [](const ArrayUpdate& a) {
    return computed_in(a.dtype) == kFloat32;
  });
  const bool is_exact = finite && sum > 0x1p-900;
  if (all_float32 || is_exact || std::isnan(sum)) return std::sqrt(sum);
  const double factor = finite ? 0x1p600 : 0x1p-600;
  const double scaled_sum = sum_of_squares(table, threads, factor);
  finite = std::isfinite(scaled_sum);
  return finite ? std::sqrt(scaled_sum) / factor : sum;
}

double StepPlan::sum_of_squares(const StageTable& table, const Threads& threads,
                                double factor) noexcept {
  constexpr double kNoBound = std::numeric_limits<double>::infinity();
  constexpr int64_t kLinesPerBlock = kNormBlock * sizeof(float) / kLineBytes;
  GradCoefficientSet grad = grad_coefficients(wishes_.grad_scale, factor, kNoBound);
  // Float32 numbers beside huge float64 ones do not count, and beside vanishing ones they are
  // zeros.
  if (factor > 1.0) grad.f32.clip = 1.0f;
  const int64_t elements = arrays_.back().element_end;
  const auto blocks = static_cast<int64_t>(sums_.size());
  for_lines(blocks * kLinesPerBlock, threads, [&](int64_t begin, int64_t end) {
    const DefaultFloatMode mode;
    // Whoever has the first line of a block sums it.
    const auto first_from = [](int64_t line) {
      return (line + kLinesPerBlock - 1) / kLinesPerBlock;
    };
    const int64_t last = first_from(end);
    for (int64_t block = first_from(begin); block < last; ++block) {
      double lanes[kNormLanes] = {};
      add_block(table, grad, block * kNormBlock, std::min((block + 1) * kNormBlock, elements),
                lanes);
      sums_[static_cast<size_t>(block)] = sum_of_pairs(lanes, kNormLanes);
    }
  });
  return sum_of_pairs(sums_.data(), sums_.size());
}

void StepPlan::add_block(const StageTable& table, const GradCoefficientSet& grad, int64_t begin,
                         int64_t end, double* lanes) const noexcept {
  auto array = std::upper_bound(
      arrays_.begin(), arrays_.end(), begin,
      [](int64_t element, const ArrayUpdate& a) { return element < a.element_end; });
  Tile tile;
  for (int64_t at = begin; at < end; ++array) {
    const DType stored = array->grad_dtype, computed = computed_in(stored);
    const int64_t last = std::min(end, array->element_end);
    const bool scales = computed == kFloat32 ? !grad.f32.do_nothing() : !grad.f64.do_nothing();
    const int64_t step = scales || is_coded(stored) ? kTile : last - at;
    int64_t first = at - (array->element_end - array->size);
    for (; at < last; at += step, first += step) {
      const int64_t count = std::min(step, last - at);
      const void* elements = element_at(array->streams.at[kGrad], stored, first);
      elements = decoded(table, stored, elements, count, tile);
      if (scales) elements = scaled(table, computed, grad, elements, count, tile);
      table.add_squares[computed](elements, at - begin, count, lanes);
    }
    at = last;
  }
}

}  // namespace fused_adam
