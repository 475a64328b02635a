#include "accumulate.hpp"

#include "slices.hpp"

namespace fused_adam {

void GradSums::add(const void* grad, void* sum, int64_t size, DType dtype) {
  if (size == 0) return;
  const int64_t lines_before = sums_.empty() ? 0 : sums_.back().line_end;
  sums_.push_back({grad, sum, size, lines_before + lines_of(dtype, size), dtype});
}

void GradSums::run(const StageTable& table, const Threads& threads) const noexcept {
  for_slices(sums_, threads, [&](const Sum& sum, int64_t first, int64_t last) {
    table.add_grad[sum.dtype](element_at(sum.grad, sum.dtype, first),
                              element_at(sum.sum, sum.dtype, first), last - first);
  });
}

}  // namespace fused_adam
