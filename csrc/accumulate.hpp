// Gradients that are added to others, as over the micro-batches of a step.
#pragma once

#include <stdint.h>

#include <vector>

#include "kernel/kernel.hpp"
#include "parallel.hpp"

namespace fused_adam {

class GradSums {
 public:
  // To be added, element by element: no two of them share memory.
  void add(const void* grad, DType grad_dtype, void* sum, DType dtype, int64_t size);
  void run(const StageTable& table, const Threads& threads) const noexcept;

 private:
  struct Sum {
    const void* grad;
    void* sum;
    int64_t size;
    int64_t line_end;  // cache lines of this array and all before it
    DType grad_dtype, dtype;
  };
  std::vector<Sum> sums_;
};

}  // namespace fused_adam
