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
  // zero_grad: gradients are set to zeros where they have been used.
  void begin(bool zero_grad = false);

  // The arrays that are added next take this step, counted from 1, with these options.
  void set_rule(const HyperParameters& hyper, int64_t step);

  // dtype: of param. begins_ema: there are no averages of it yet.
  void add_array(const Streams& streams, int64_t size, DType dtype, bool begins_ema = false);

  // Updates all arrays, cut among threads all together. Nothing in here can fail.
  void run(const StageTable& table, const Threads& threads) noexcept;

 private:
  struct ArrayUpdate {
    Streams streams;
    int64_t size;
    int64_t line_end;  // cache lines of param in this array and all before it
    uint32_t rule;
    DType dtype;
    bool begins_ema;
  };
  struct Rule {
    CoefficientSet coefficients;
    bool l2, amsgrad, ema;
  };
  // What is done to each piece of an array, in this order.
  struct Stages {
    // A stage has at least a pointer for each element type, and stands in a step at most once.
    static constexpr int kMost = sizeof(StageTable) / sizeof(Stage[kDTypes]);
    Stage at[kMost];
    int count = 0;

    void add(Stage stage) { at[count++] = stage; }
  };

  Stages stages_of(const ArrayUpdate& array, const StageTable& table) const noexcept;
  void run_lines(const StageTable& table, int64_t begin, int64_t end) const noexcept;
  void run_slice(const ArrayUpdate& array, const StageTable& table, int64_t first,
                 int64_t last) const noexcept;

  std::vector<ArrayUpdate> arrays_;
  std::vector<Rule> rules_;
  bool zero_grad_ = false;
};

}  // namespace fused_adam
