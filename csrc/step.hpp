// The plan of one step: every array that it updates, checked by whoever fills it in, and its
// execution.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "kernel/kernel.hpp"

namespace fused_adam {

class StepPlan {
 public:
  // Forgets the last step but keeps its memory: a plan that is used again allocates nothing.
  void clear();

  // Coefficients are shared: arrays refer to them by the number that is returned.
  size_t add_coefficients(const CoefficientSet& set);

  void add_array(const Streams& streams, int64_t size, DType dtype, Form form, size_t coefficients);

  // Updates all arrays, in one parallel region over all of them together or in none. max_threads is
  // what the caller allows, 0 for what the machine allows. Nothing in here can fail.
  void run(const KernelTable& kernels, int max_threads) noexcept;

 private:
  struct ArrayUpdate {
    Streams streams;
    int64_t size;
    int64_t line_end;  // cache lines of param in this array and all before it
    DType dtype;
    Form form;
    size_t coefficients;
  };

  void run_lines(const KernelTable& kernels, int64_t begin, int64_t end) const noexcept;

  std::vector<ArrayUpdate> arrays_;
  std::vector<CoefficientSet> coefficients_;
};

}  // namespace fused_adam
