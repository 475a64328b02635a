// Of class Optimizer: averages of its parameters, shown and exchanged with them.
#include <string.h>

#include <algorithm>
#include <exception>
#include <utility>
#include <vector>

#include "../float_mode.hpp"
#include "../tiles.hpp"
#include "optimizer.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

// A param that cannot hold all of its average takes its nearest numbers, and its own are kept.
void exchange(Slot& slot, const StageTable& stages) {
  const DType dtype = slot.layout().dtype;
  const int64_t size = slot.layout().size;
  char* const param = static_cast<char*>(slot.streams.at[kParam]);
  char* const ema = static_cast<char*>(slot.streams.at[kEma]);
  slot.holds_average = !slot.holds_average;
  if (!is_coded(dtype)) {
    std::swap_ranges(param, param + bytes_of(kEma, slot.storage(), size), ema);
  } else if (slot.holds_average) {
    const DefaultFloatMode mode;
    memcpy(slot.kept_param.data(), param, slot.kept_param.size());
    encode(stages, dtype, ema, param, size);
  } else {
    memcpy(param, slot.kept_param.data(), slot.kept_param.size());
  }
}

// Numbers of a param, wherever they are, as they begin an average.
void begin_average(const StageTable& stages, DType dtype, const void* param, void* ema,
                   int64_t size) {
  if (is_coded(dtype)) {
    const DefaultFloatMode mode;
    decode(stages, dtype, param, nullptr, ema, size);
  } else {
    memcpy(ema, param, static_cast<size_t>(size * size_of(dtype)));
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
  read_groups(param_groups, Rates::not_asked());
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
      const bool has_master = hypers_[slot.group].master_weights && slot.has_values(kMasterParam);
      const Stream from = has_master ? kMasterParam : kParam;
      begin_average(*isa_.stages, dtype_of(from, slot.storage()), slot.streams.at[from],
                    slot.streams.at[kEma], slot.layout().size);
    }
    views.push_back(fresh_view(slot.array(kEma)));
  }
  return unflatten(views, 0);
}

void Optimizer::use_averages(py::handle param_groups) {
  StepScope scope(*this);
  read_groups(param_groups, Rates::not_asked());
  require_averages();
  // Equal to its param until its first step.
  const auto differs = [&](const Slot& slot) {
    return hypers_[slot.group].keeps_ema() && slot.has_values(kEma);
  };
  std::vector<std::vector<char>> kept(slots_.size());
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!differs(slots_[i])) continue;
    check_param(slots_[i]);
    const ArrayFacts& param = slots_[i].layout();
    if (is_coded(param.dtype)) kept[i].resize(static_cast<size_t>(param.bytes()));
  }
  if (!memory_is_indexed_) index_memory();
  const WithoutGil no_gil;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!differs(slots_[i])) continue;
    slots_[i].kept_param = std::move(kept[i]);
    exchange(slots_[i], *isa_.stages);
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
      const DType dtype = slot.layout().dtype;
      if (is_coded(dtype)) {  // its numbers go where those of all others are
        begin_average(*isa_.stages, dtype, slot.kept_param.data(), slot.streams.at[kEma],
                      slot.layout().size);
      }
      continue;
    }
    const WithoutGil no_gil;
    exchange(slot, *isa_.stages);
    std::vector<char>().swap(slot.kept_param);
  }
  if (problem) std::rethrow_exception(problem);
  exclusive.leave_for(Use::kNone);
}

}  // namespace fused_adam
