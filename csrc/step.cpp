#include "step.hpp"

#include <algorithm>

#include "float_mode.hpp"

namespace fused_adam {
namespace {

// Work is cut at multiples of a cache line of param: no two threads write to the same line of an
// aligned array, and a float64 element counts twice a float32 one, as it does for memory.
constexpr int64_t kLineBytes = 64;

int64_t elements_per_line(DType dtype) { return dtype == kFloat32 ? 16 : 8; }

}  // namespace

static_assert(kLineBytes == 16 * sizeof(float) && kLineBytes == 8 * sizeof(double));

void StepPlan::clear() {
  arrays_.clear();
  rules_.clear();
}

void StepPlan::set_rule(const HyperParameters& hyper, int64_t step) {
  const bool l2 = !hyper.decoupled_weight_decay && hyper.weight_decay != 0.0;
  rules_.push_back({coefficients(hyper, step), {l2, hyper.amsgrad}});
}

void StepPlan::add_array(const Streams& streams, int64_t size, DType dtype) {
  if (size == 0) return;
  const int64_t per_line = elements_per_line(dtype);
  const int64_t lines_before = arrays_.empty() ? 0 : arrays_.back().line_end;
  const int64_t lines = (size + per_line - 1) / per_line;
  arrays_.push_back({streams, size, lines_before + lines, dtype, rules_.size() - 1});
}

void StepPlan::run(const KernelTable& kernels, const Threads& threads) noexcept {
  if (arrays_.empty()) return;
  const int64_t lines = arrays_.back().line_end;
  for_lines(lines, threads, [&](int64_t begin, int64_t end) { run_lines(kernels, begin, end); });
}

void StepPlan::run_lines(const KernelTable& kernels, int64_t begin, int64_t end) const noexcept {
  const DefaultFloatMode mode;
  auto array =
      std::upper_bound(arrays_.begin(), arrays_.end(), begin,
                       [](int64_t line, const ArrayUpdate& a) { return line < a.line_end; });
  int64_t line_begin = array == arrays_.begin() ? 0 : (array - 1)->line_end;
  for (; array != arrays_.end() && line_begin < end; line_begin = array->line_end, ++array) {
    const int64_t per_line = elements_per_line(array->dtype);
    const int64_t first = std::max<int64_t>(begin - line_begin, 0) * per_line;
    const int64_t last = std::min((end - line_begin) * per_line, array->size);
    const Rule& rule = rules_[array->rule];
    kernels.at(array->dtype, rule.form)(array->streams, first, last, rule.coefficients);
  }
}

}  // namespace fused_adam
