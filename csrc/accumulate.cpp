#include "accumulate.hpp"

#include "slices.hpp"
#include "tiles.hpp"

namespace fused_adam {

void GradSums::add(const void* grad, DType grad_dtype, void* sum, DType dtype, int64_t size) {
  if (size == 0) return;
  const int64_t lines_before = sums_.empty() ? 0 : sums_.back().line_end;
  sums_.push_back({grad, sum, size, lines_before + lines_of(dtype, size), grad_dtype, dtype});
}

void GradSums::run(const StageTable& table, const Threads& threads) const noexcept {
  for_slices(sums_, threads, [&](const Sum& sum, int64_t first, int64_t last) {
    const int64_t step = is_coded(sum.dtype) || is_coded(sum.grad_dtype) ? kTile : last - first;
    Tile grad_tile, sum_tile;
    for (; first < last; first += step) {
      const int64_t count = std::min(step, last - first);
      const void* const grad = decoded(
          table, sum.grad_dtype, element_at(sum.grad, sum.grad_dtype, first), count, grad_tile);
      void* const total = element_at(sum.sum, sum.dtype, first);
      if (is_coded(sum.dtype)) {
        decoded(table, sum.dtype, total, count, sum_tile);
        table.add_grad[computed_in(sum.dtype)](grad, sum_tile.bytes, count);
        encode(table, sum.dtype, sum_tile.bytes, total, count);
      } else {
        table.add_grad[sum.dtype](grad, total, count);
      }
    }
  });
}

}  // namespace fused_adam
