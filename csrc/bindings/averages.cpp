// Of class Optimizer: averages of its parameters, shown and exchanged with them.
#include <string.h>

#include <algorithm>
#include <exception>

#include "../float_mode.hpp"
#include "optimizer.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

// A param whose average is stored in another type takes its nearest numbers, and what they are
// nearest to is kept.
void exchange(Slot& slot, const StageTable& stages) {
  const DType dtype = slot.layout().dtype;
  const int64_t size = slot.layout().size, bytes = bytes_of(kEma, dtype, size);
  char* const param = static_cast<char*>(slot.streams.at[kParam]);
  char* const ema = static_cast<char*>(slot.streams.at[kEma]);
  slot.holds_average = !slot.holds_average;
  if (!is_coded(dtype)) {
    std::swap_ranges(param, param + bytes, ema);
    return;
  }
  const DefaultFloatMode mode;
  const Convert decode = stages.decode[dtype - kComputed],
                encode = stages.encode[dtype - kComputed];
  if (slot.holds_average) {
    memcpy(slot.kept_average.data(), ema, static_cast<size_t>(bytes));
    decode(param, ema, size);
    encode(slot.kept_average.data(), param, size);
  } else {
    encode(ema, param, size);
    memcpy(ema, slot.kept_average.data(), static_cast<size_t>(bytes));
  }
}

}  // namespace

void Optimizer::require_averages() const {
  if (std::none_of(hypers_.begin(), hypers_.end(), [](auto& h) { return h.keeps_ema(); })) {
    throw py::value_error("there are no averages: Adam(..., ema_decay=0.999) keeps them.");
  }
}

py::list Optimizer::averages(py::handle param_groups) {
  const StepScope scope(*this);
  read_groups(param_groups);
  require_averages();
  add_missing(wanted_by_options());
  std::vector<py::object> views;
  for (Slot& slot : slots_) {
    if (!hypers_[slot.group].keeps_ema()) {
      views.push_back(py::none());
      continue;
    }
    if (!slot.has_values(kEma)) {
      check_layout(slot);
      const DType dtype = slot.layout().dtype;
      const int64_t size = slot.layout().size;
      void* const ema = slot.streams.at[kEma];
      const void* const param = slot.streams.at[kParam];
      if (is_coded(dtype)) {
        const DefaultFloatMode mode;
        isa_.stages->decode[dtype - kComputed](param, ema, size);
      } else {
        memcpy(ema, param, static_cast<size_t>(bytes_of(kEma, dtype, size)));
      }
    }
    views.push_back(fresh_view(slot.array(kEma)));
  }
  return unflatten(views, 0);
}

void Optimizer::use_averages(py::handle param_groups) {
  StepScope scope(*this);
  read_groups(param_groups);
  require_averages();
  // Equal to its param until its first step.
  const auto differs = [&](const Slot& slot) {
    return hypers_[slot.group].keeps_ema() && slot.has_values(kEma);
  };
  for (Slot& slot : slots_) {
    if (differs(slot)) check_param(slot);
    if (differs(slot) && is_coded(slot.layout().dtype)) {
      slot.kept_average.resize(static_cast<size_t>(slot.layout().size));
    }
  }
  if (!memory_is_indexed_) index_memory();
  const WithoutGil no_gil;
  for (Slot& slot : slots_) {
    if (differs(slot)) exchange(slot, *isa_.stages);
  }
  scope.leave_for(Use::kAverages);
}

void Optimizer::use_params() {
  Exclusive exclusive(use_, Use::kAverages);
  std::exception_ptr problem;
  for (Slot& slot : slots_) {
    if (!slot.holds_average) continue;
    try {
      const void* const before = slot.streams.at[kParam];
      check_layout(slot);
      // It could be written when it was exchanged. Where it still is at its place, a flag that says
      // otherwise since, to protect it, does not keep it from its own values.
      if (slot.streams.at[kParam] != before) check_param(slot);
    } catch (...) {
      if (!problem) problem = std::current_exception();
      continue;
    }
    const WithoutGil no_gil;
    exchange(slot, *isa_.stages);
    slot.kept_average = {};
  }
  if (problem) std::rethrow_exception(problem);
  exclusive.leave_for(Use::kNone);
}

}  // namespace fused_adam
