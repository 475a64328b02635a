// A step of many parameters whose arrays the caller owns, moments and step counts included: for
// frameworks with optimizer classes of their own.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <vector>

#include "../dispatch.hpp"
#include "../overlap.hpp"
#include "../step.hpp"
#include "exclusive.hpp"
#include "options.hpp"
#include "tensors.hpp"

namespace fused_adam {

class BatchStep {
 public:
  // tensor_type: see TensorReader.
  BatchStep(const std::string& isa, const Threads& threads, const py::object& tensor_type);

  // groups: a list of (options, columns, number) for each group; columns: a tuple with a list, or
  // None, for each stream of the table, and the step counts at its end; number: of its first
  // parameter. One whose gradient is None is left out. Nothing is written where anything is wrong.
  StepReport step(const py::list& groups, double grad_scale, bool allow_mixed);

 private:
  // What is remembered of a step, so that the next one need not look for overlaps again.
  struct Written {
    const void* data;
    int64_t bytes;
    int64_t owner;

    bool operator==(const Written& other) const {
      return data == other.data && bytes == other.bytes && owner == other.owner;
    }
  };
  class Scope;

  struct Group {
    py::dict options;
    py::tuple columns;
    uint32_t first;
  };
  void plan_group(size_t index, const Group& group, bool allow_mixed);
  void plan_param(size_t index, const Group& group, const HyperParameters& hyper, unsigned wanted,
                  bool allow_mixed, int64_t& planned_step);
  void check_overlaps();
  std::string name_of(int64_t owner) const;

  const Isa& isa_;
  const Threads threads_;
  const TensorReader reader_;
  const OptionReader options_;
  std::atomic<Use> use_{Use::kNone};
  StepPlan plan_;
  std::vector<Written> written_, known_;
  std::vector<Memory> memories_, grads_;  // of written_; of gradients
  std::vector<Streams> streams_;          // of each parameter that takes part
  std::vector<std::pair<StepCount, int64_t>> counts_;
  std::vector<size_t> hints_;
  WrittenMemory memory_;
  std::vector<std::pair<size_t, size_t>> places_;  // group and index of each that takes part
};

}  // namespace fused_adam
