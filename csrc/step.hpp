// The plan of one step: every array that it updates, checked by whoever fills it in, and its
// execution.
//
// Most steps are one pass over memory. One that has to know the norm of all gradients, or whether
// they are finite, reads them in a pass before it, decides, and then updates or changes nothing.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "kernel/kernel.hpp"
#include "parallel.hpp"
#include "stream_table.hpp"

namespace fused_adam {

// What a step is asked for, over all its arrays.
struct StepWishes {
  bool zero_grad = false;        // gradients are zeros afterwards, also where the step is skipped
  bool measures = false;         // the norm of all gradients
  bool skips_nonfinite = false;  // measures, too
  double grad_scale = 1.0;       // what gradients are divided by before anything else

  void add(const HyperParameters& hyper);
};

struct StepReport {
  bool measured = false, skipped = false;
  double grad_norm = 0.0;  // if measured: of the unscaled gradients, before they are clipped
};

class StepPlan {
 public:
  // Forgets the last step but keeps its memory: a plan that is used again allocates nothing.
  void begin(const StepWishes& wishes);

  // The arrays that are added next take this step, counted from 1, with these options.
  void set_rule(const HyperParameters& hyper, int64_t step);

  // streams: as long as the plan is used. begins: the streams that begin as copies of param in this
  // step, a bit for each. number: of the parameter, by which its stochastic rounding differs from
  // that of others.
  void add_array(const Streams& streams, int64_t size, const Storage& storage, DType grad_dtype,
                 unsigned begins = 0, uint32_t number = 0);

  // No more arrays: makes room for what is measured.
  void end();

  // Both cut among threads, all arrays together, and nothing in them can fail. The first one reads
  // gradients, if it is asked to, and decides; the second one does what it decided.
  StepReport measure(const StageTable& table, const Threads& threads) noexcept;
  void run(const StageTable& table, const Threads& threads, const StepReport& report) noexcept;

  bool measures() const { return wishes_.measures; }

 private:
  struct ArrayUpdate {
    const Streams* streams;
    int64_t size;
    int64_t line_end;     // cache lines of param in this array and all before it
    int64_t element_end;  // elements, likewise
    uint32_t rule, number;
    DType dtype, grad_dtype;  // of param
    HyperParameters::StateDType state;
    unsigned begins;
    bool coded;  // something of it is

    Storage storage() const { return {dtype, state}; }
  };
  struct Rule {
    CoefficientSet coefficients;
    double max_norm, clip_value;  // HyperParameters::kNone: none
    int64_t step, seed;
    bool l2, amsgrad, ema, masters, rounds_stochastically;
    bool scales_grad[kComputed];
    GradCoefficientSet grad;     // only where it scales
    uint32_t dithers[kMoments];  // only where moments are stored in fewer bytes
  };

  void run_slice(const ArrayUpdate& array, const StageTable& table, int64_t first,
                 int64_t last) const noexcept;
  static void round_to_blocks(const ArrayUpdate& array, int64_t& first, int64_t& last) noexcept;
  void run_tiles(const ArrayUpdate& array, const StageTable& table, int64_t first,
                 int64_t last) const noexcept;
  // piece: of the array from `first` on, with param and gradient as these types.
  void run_rule(const ArrayUpdate& array, const StageTable& table, const Streams& piece,
                int64_t first, int64_t count, DType param, DType grad) const noexcept;
  void encode_param(const ArrayUpdate& array, const StageTable& table, const void* numbers,
                    void* param, int64_t first, int64_t count) const noexcept;
  static Streams piece_of(const ArrayUpdate& array, int64_t first) noexcept;
  void clear_grads(const StageTable& table, const Threads& threads) const noexcept;

  double norm(const StageTable& table, const Threads& threads, bool& finite) noexcept;
  double sum_of_squares(const StageTable& table, const Threads& threads, double factor) noexcept;
  // Of the elements of a block, from begin to end, over all arrays.
  void add_block(const StageTable& table, const GradCoefficientSet& grad, int64_t begin,
                 int64_t end, double* lanes) const noexcept;
  void prepare_grads(double grad_norm) noexcept;

  std::vector<ArrayUpdate> arrays_;
  std::vector<Rule> rules_;
  std::vector<double> sums_;  // of squares, one for each block of elements
  StepWishes wishes_;
};

}  // namespace fused_adam
