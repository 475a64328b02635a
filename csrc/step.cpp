#include "step.hpp"

#include <string.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "slices.hpp"
#include "tiles.hpp"

namespace fused_adam {
namespace {

// Unscaled and clipped. grad may be in that tile already. dtype: computed in.
void* scaled(const StageTable& table, DType dtype, const GradCoefficientSet& all, const void* grad,
             int64_t count, Tile& tile) noexcept {
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
                    step,
                    hyper.seed,
                    l2,
                    hyper.amsgrad,
                    hyper.keeps_ema(),
                    hyper.master_weights,
                    hyper.stochastic_rounding,
                    {},
                    {},
                    {}});
  if (hyper.state_dtype == HyperParameters::kFull) return;
  for (uint32_t i = 0; i < kMoments; ++i) rules_.back().dithers[i] = moment_dither(i, step);
}

void StepPlan::add_array(const Streams& streams, int64_t size, const Storage& storage,
                         DType grad_dtype, unsigned begins, uint32_t number) {
  if (size == 0) return;
  int64_t line_end = lines_of(storage.param, size), element_end = size;
  if (!arrays_.empty()) {
    line_end += arrays_.back().line_end;
    element_end += arrays_.back().element_end;
  }
  const auto rule = static_cast<uint32_t>(rules_.size() - 1);
  const bool coded =
      is_coded(storage.param) || is_coded(grad_dtype) || storage.state != HyperParameters::kFull;
  arrays_.push_back({&streams, size, line_end, element_end, rule, number, storage.param, grad_dtype,
                     storage.state, begins, coded});
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

// The streams from this element of param on.
Streams StepPlan::piece_of(const ArrayUpdate& array, int64_t first) noexcept {
  if (first == 0) return *array.streams;
  Streams piece = {};
  for (int i = 0; i < kStreams; ++i) {
    if (array.streams->at[i] == nullptr) continue;
    const auto stream = static_cast<Stream>(i);
    const int64_t offset = stream == kGrad ? first * size_of(array.grad_dtype)
                                           : bytes_of(stream, array.storage(), first);
    piece.at[i] = static_cast<char*>(array.streams->at[i]) + offset;
  }
  return piece;
}

void StepPlan::run_slice(const ArrayUpdate& array, const StageTable& table, int64_t first,
                         int64_t last) const noexcept {
  const Rule& rule = rules_[array.rule];
  // The rule alone needs no tiles.
  if (rule.ema || rule.scales_grad[computed_in(array.dtype)] || wishes_.zero_grad) {
    run_tiles(array, table, first, last);
  } else if (!array.coded) {
    const Stage adam = table.adam[array.dtype][rule.l2][rule.amsgrad];
    if (first == 0) return adam(*array.streams, last, rule.coefficients);
    adam(piece_of(array, first), last - first, rule.coefficients);
  } else if (is_coded(array.dtype) && (rule.masters || rule.rounds_stochastically)) {
    run_tiles(array, table, first, last);
  } else {
    round_to_blocks(array, first, last);
    run_rule(array, table, piece_of(array, first), first, last - first, array.dtype,
             array.grad_dtype);
  }
}

// Whoever has the first line of a block has all of it.
void StepPlan::round_to_blocks(const ArrayUpdate& array, int64_t& first, int64_t& last) noexcept {
  if (!is_in_blocks(dtype_of(kExpAvg, array.storage()))) return;
  first = std::min((first + kBlock - 1) / kBlock * kBlock, array.size);
  last = std::min((last + kBlock - 1) / kBlock * kBlock, array.size);
}

void StepPlan::run_rule(const ArrayUpdate& array, const StageTable& table, const Streams& piece,
                        int64_t first, int64_t count, DType param, DType grad) const noexcept {
  const Rule& rule = rules_[array.rule];
  if (!is_coded(param) && !is_coded(grad) && array.state == HyperParameters::kFull) {
    table.adam[param][rule.l2][rule.amsgrad](piece, count, rule.coefficients);
    return;
  }
  CodedStep step = {param, grad, dtype_of(kExpAvg, array.storage()), rule.l2, rule.amsgrad,
                    first, {}};
  std::copy(std::begin(rule.dithers), std::end(rule.dithers), step.dithers);
  table.coded_adam[array.state](piece, count, rule.coefficients, step);
}

void StepPlan::run_tiles(const ArrayUpdate& array, const StageTable& table, int64_t first,
                         int64_t last) const noexcept {
  const Rule& rule = rules_[array.rule];
  const DType computed = computed_in(array.dtype);
  const bool coded = is_coded(array.dtype);
  // An average is of numbers that are not rounded yet.
  const bool in_tile = coded && !rule.masters && (rule.ema || rule.rounds_stochastically);
  const bool scales = rule.scales_grad[computed];
  const auto begins = [&](Stream stream) { return (array.begins >> stream & 1u) != 0; };
  round_to_blocks(array, first, last);
  Tile grad_tile, param_tile;
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t count = std::min(kTile, last - begin);
    Streams piece = piece_of(array, begin);
    void* const param = piece.at[kParam];
    void* const grad = piece.at[kGrad];
    if (scales) {
      const void* const numbers = decoded(table, array.grad_dtype, grad, count, grad_tile);
      piece.at[kGrad] = scaled(table, computed, rule.grad, numbers, count, grad_tile);
    }
    if (in_tile) piece.at[kParam] = param_tile.bytes;
    if (coded && rule.masters) piece.at[kParam] = piece.at[kMasterParam];
    const bool as_numbers = piece.at[kParam] != param;
    if (as_numbers && (in_tile || begins(kMasterParam))) {
      decode(table, array.dtype, param, nullptr, piece.at[kParam], count);
    }
    if (rule.ema && begins(kEma)) table.begin_average[computed](piece, count, rule.coefficients);
    run_rule(array, table, piece, begin, count, as_numbers ? computed : array.dtype,
             scales ? computed : array.grad_dtype);
    if (rule.ema) table.average[computed](piece, count, rule.coefficients);
    if (as_numbers) encode_param(array, table, piece.at[kParam], param, begin, count);
    if (wishes_.zero_grad) clear(table, array.grad_dtype, grad, count);
  }
}

void StepPlan::encode_param(const ArrayUpdate& array, const StageTable& table, const void* numbers,
                            void* param, int64_t first, int64_t count) const noexcept {
  const Rule& rule = rules_[array.rule];
  if (!rule.rounds_stochastically) return encode(table, array.dtype, numbers, param, count);
  const uint32_t dither = param_dither(static_cast<uint64_t>(rule.seed), array.number, rule.step);
  encode(table, array.dtype, numbers, param, nullptr, first, count, dither);
}

void StepPlan::clear_grads(const StageTable& table, const Threads& threads) const noexcept {
  for_slices(arrays_, threads, [&](const ArrayUpdate& array, int64_t first, int64_t last) {
    void* const grad = element_at(array.streams->at[kGrad], array.grad_dtype, first);
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
      const void* elements = element_at(array->streams->at[kGrad], stored, first);
      elements = decoded(table, stored, elements, count, tile);
      if (scales) elements = scaled(table, computed, grad, elements, count, tile);
      table.add_squares[computed](elements, at - begin, count, lanes);
    }
    at = last;
  }
}

}  // namespace fused_adam
