// The plan of one step: every array that it updates, checked by whoever fills it in, and its
// execution.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "kernel/kernel.hpp"
#include "parallel.hpp"

namespace fused_adam {

class StepPlan {
 public:
  // Forgets the last step but keeps its memory: a plan that is used again allocates nothing.
  void clear();

  // The arrays that are added next take this step, counted from 1, with these options.
  void set_rule(const HyperParameters& hyper, int64_t step);

  void add_array(const Streams& streams, int64_t size, DType dtype);

  // Updates all arrays, cut among threads all together. Nothing in here can fail.
  void run(const KernelTable& kernels, const Threads& threads) noexcept;

 private:
  struct ArrayUpdate {
    Streams streams;
    int64_t size;
    int64_t line_end;  // cache lines of param in this array and all before it
    DType dtype;
    size_t rule;
  };
  struct Rule {
    CoefficientSet coefficients;
    Form form;
  };

  void run_lines(const KernelTable& kernels, int64_t begin, int64_t end) const noexcept;

  std::vector<ArrayUpdate> arrays_;
  std::vector<Rule> rules_;
};

}  // namespace fused_adam
