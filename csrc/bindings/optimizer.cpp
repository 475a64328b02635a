#include "optimizer.hpp"

#include <pybind11/stl.h>
#include <string.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "../accumulate.hpp"
#include "containers.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

// Owners in WrittenMemory: a stream of a slot.
int64_t owner_of(size_t slot) { return static_cast<int64_t>(slot) * kStreams; }
size_t slot_of(int64_t owner) { return static_cast<size_t>(owner / kStreams); }
bool is_param(int64_t owner) { return owner % kStreams == kParam; }

const char* role_of(int64_t owner) { return is_param(owner) ? "" : "the state of "; }

}  // namespace

Optimizer::Optimizer(const std::string& isa, const Threads& threads, bool allow_mixed)
    : isa_(isa_by_name(isa)), threads_(threads), allow_mixed_(allow_mixed), params_key_("params") {}

Place Optimizer::place(const char* role, const Slot& slot) const {
  return place_in(trees_[slot.tree], role, slot.leaf);
}

Place Optimizer::place_in(const Tree& tree, const char* role, size_t leaf) {
  return {role, tree.root, tree.structure->paths()[leaf]};
}

// --- Memory ------------------------------------------------------------------------------------

void Optimizer::list_memory(WrittenMemory& memory, std::vector<Slot>& added, const Tree* tree) {
  memory.clear();
  for (size_t i = 0; i < slots_.size(); ++i) slots_[i].add_to(memory, owner_of(i));
  for (size_t i = 0; i < added.size(); ++i) added[i].add_to(memory, owner_of(slots_.size() + i));
  const auto [a, b] = memory.index();
  if (a == WrittenMemory::kNone) return;
  const auto slot = [&](int64_t owner) -> const Slot& {
    const size_t i = slot_of(owner);
    return i < slots_.size() ? slots_[i] : added[i - slots_.size()];
  };
  const auto text = [&](int64_t owner) {
    const Tree& of = slot_of(owner) < slots_.size() ? trees_[slot(owner).tree] : *tree;
    return place_in(of, role_of(owner), slot(owner).leaf).str();
  };
  const bool same = is_param(a) && is_param(b) && slot(a).param().is(slot(b).param());
  throw py::value_error(text(b) + (same ? " is the same array as " : " shares memory with ") +
                        text(a) + ". Every array that is updated needs memory of its own.");
}

void Optimizer::index_memory() {
  memory_is_indexed_ = false;
  std::vector<Slot> none;
  list_memory(memory_, none, nullptr);
  memory_is_indexed_ = true;
}

std::vector<unsigned> Optimizer::wanted_by_options() const {
  std::vector<unsigned> wanted;
  for (const Slot& slot : slots_) {
    wanted.push_back(streams_for(slot.layout().dtype, wanted_streams(hypers_[slot.group])));
  }
  return wanted;
}

void Optimizer::add_missing(const std::vector<unsigned>& wanted) {
  memory_is_indexed_ = false;
  give_missing(slots_, slots_mutex_, wanted);
}

// --- The checks of a step ----------------------------------------------------------------------

void Optimizer::check_layout(Slot& slot) {
  const Place name = place("", slot);
  const ArrayFacts param = array_facts(slot.param(), name);
  require_like(param, name, slot.layout(), nullptr);
  if (param.data != slot.listed_data) memory_is_indexed_ = false;
  slot.streams.at[kParam] = param.data;
}

void Optimizer::check_param(Slot& slot) {
  check_layout(slot);
  require_writeable(slot.param(), place("", slot),
                    "a step updates it in place. Use a.setflags(write=True), or leave it out: None "
                    "as its grad.");
}

void Optimizer::notice_moved_params() {
  for (const Slot& slot : slots_) {
    const void* data = py::detail::array_proxy(slot.param().ptr())->data;
    memory_is_indexed_ &= data == slot.listed_data;
  }
}

void Optimizer::update_memory() {
  memory_.look_again();
  notice_moved_params();
  if (!memory_is_indexed_) index_memory();
}

void Optimizer::check_grad(Slot& slot, py::handle array, const char* role) {
  const Place name = place(role, slot), param_name = place("", slot);
  const ArrayFacts grad = array_facts(array, name);
  require_grad(grad, name, slot.layout(), param_name, allow_mixed_);
  int64_t owner = memory_.owner_of_overlap(grad.memory(), slot.grad_hint);
  if (owner != WrittenMemory::kNone) {
    // A param that is left out of this step may have moved since, and its old memory be this grad.
    index_memory();
    owner = memory_.owner_of_overlap(grad.memory(), slot.grad_hint);
  }
  if (owner != WrittenMemory::kNone) {
    throw py::value_error(name.str() + " shares memory with " +
                          place(role_of(owner), slots_[slot_of(owner)]).str() +
                          ", which a step writes. Pass a copy.");
  }
  slot.streams.at[kGrad] = grad.data;
  slot.grad_dtype = grad.dtype;
}

void Optimizer::check_grads_are_writeable(const char* role, const char* why_written,
                                          const char* why_alone) {
  written_grads_.clear();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (grads_[i].is_none()) continue;
    const Place name = place(role, slots_[i]);
    require_writeable(grads_[i], name, why_written);
    written_grads_.add(array_facts(grads_[i], name).memory(), static_cast<int64_t>(i));
  }
  const auto [a, b] = written_grads_.index();
  if (a == WrittenMemory::kNone) return;
  const auto text = [&](int64_t i) { return place(role, slots_[static_cast<size_t>(i)]).str(); };
  throw py::value_error(text(b) + " shares memory with " + text(a) + ", and " + why_alone +
                        " Pass a copy.");
}

// One pass over all arrays, since what a step knows of 1000 arrays no longer fits the first cache.
// Returns whether streams are missing, of options that were switched on since the last step.
bool Optimizer::check_and_plan(const StepWishes& wishes) {
  plan_.begin(wishes);
  memory_.look_again();
  // A grad that is written must not be the new memory of a param that is left out of this step.
  if (wishes.zero_grad) notice_moved_params();
  unsigned missing = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    const Group& group = groups_[g];
    const auto wanted = wanted_streams(hypers_[g]);
    int64_t step = -1;  // of the rule that was set last; most params share one
    for (size_t i = group.first; i < group.first + group.count; ++i) {
      if (grads_[i].is_none()) continue;
      Slot& slot = slots_[i];
      check_param(slot);
      check_grad(slot, grads_[i]);
      const unsigned wanted_here = streams_for(slot.layout().dtype, wanted);
      missing |= slot.missing(wanted_here);
      if (slot.step + 1 != step) {
        step = slot.step + 1;
        plan_.set_rule(hypers_[g], step);
      }
      plan_.add_array(slot.streams, slot.layout().size, slot.storage(), slot.grad_dtype,
                      slot.beginning(wanted_here), static_cast<uint32_t>(i));
    }
  }
  plan_.end();
  if (wishes.zero_grad) {
    check_grads_are_writeable("grad for ", "zero_grad=True sets it to zeros.",
                              "zero_grad=True sets both to zeros, one before the other is used.");
  }
  if (memory_is_indexed_) return missing != 0;
  // A param has moved, perhaps onto a grad that was found free before it.
  index_memory();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!grads_[i].is_none()) check_grad(slots_[i], grads_[i]);
  }
  return missing != 0;
}

// --- Steps -------------------------------------------------------------------------------------

StepReport Optimizer::step(py::handle grads, py::handle param_groups, bool zero_grad,
                           double grad_scale, const OptionOverrides& overrides) {
  const StepScope scope(*this);
  // What may run code of the caller (a key that compares, a number that converts) comes first.
  flatten_grads(grads, "grads", grads_);
  read_groups(param_groups, Rates::asked_for(steps_));
  reader_.override_by(overrides, hypers_);
  StepWishes wishes;
  wishes.zero_grad = zero_grad;
  wishes.grad_scale = grad_scale;
  for (const HyperParameters& hyper : hypers_) wishes.add(hyper);
  const bool lacks_streams = check_and_plan(wishes);
  // From here on nothing can fail, but for memory for streams that are missing; a step that is
  // skipped makes none.
  StepReport report;
  if (!lacks_streams || plan_.measures()) {
    const WithoutGil no_gil;
    report = plan_.measure(*isa_.stages, threads_);
    if (!lacks_streams || report.skipped) plan_.run(*isa_.stages, threads_, report);
  }
  if (lacks_streams && !report.skipped) {
    std::vector<unsigned> wanted = wanted_by_options();
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (grads_[i].is_none()) wanted[i] = 0;
    }
    add_missing(wanted);
    check_and_plan(wishes);
    const WithoutGil no_gil;
    plan_.run(*isa_.stages, threads_, report);
  }
  if (report.skipped) {
    skipped_steps_ += 1;
    return report;
  }
  steps_.store(steps_ + 1, std::memory_order_relaxed);  // only here, and in exclusive use
  for (size_t g = 0; g < groups_.size(); ++g) {
    const bool has_masters = hypers_[g].master_weights;
    const auto wanted = wanted_streams(hypers_[g]);
    for (size_t i = groups_[g].first; i < groups_[g].first + groups_[g].count; ++i) {
      if (grads_[i].is_none()) continue;
      slots_[i].step += 1;
      slots_[i].have_begun(streams_for(slots_[i].layout().dtype, wanted));
      // What a step has passed by would take the param back to where it was.
      if (!has_masters) slots_[i].set_values(kMasterParam, false);
    }
  }
  return report;
}

void Optimizer::zero(py::handle grads) {
  const StepScope scope(*this);
  flatten_grads(grads, "grads", grads_);
  update_memory();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (grads_[i].is_none()) continue;
    check_grad(slots_[i], grads_[i]);
    require_writeable(grads_[i], place("grad for ", slots_[i]), "zero_grad() fills it.");
  }
  const WithoutGil no_gil;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (grads_[i].is_none()) continue;
    const int64_t bytes = slots_[i].layout().size * size_of(slots_[i].grad_dtype);
    memset(slots_[i].streams.at[kGrad], 0, static_cast<size_t>(bytes));
  }
}

void Optimizer::accumulate(py::handle sums, py::handle grads) {
  const StepScope scope(*this);
  std::vector<py::object> added;
  flatten_grads(grads, "grads", added);
  flatten_grads(sums, "opt.grads", grads_);
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (added[i].is_none()) grads_[i] = py::none();  // nothing is written there
    if (added[i].is_none() || !grads_[i].is_none()) continue;
    throw py::value_error("opt.grads has no array for " + place("", slots_[i]).str() +
                          " to add its gradient to.");
  }
  update_memory();
  const auto check = [&](const std::vector<py::object>& arrays, const char* role) {
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (!arrays[i].is_none()) check_grad(slots_[i], arrays[i], role);
    }
  };
  constexpr const char* kBuffer = "opt.grads for ";
  check(grads_, kBuffer);
  check_grads_are_writeable(kBuffer, "accumulate() adds to it.", "accumulate() adds to both.");
  check(added, "grad for ");
  GradSums all;
  size_t hint = 0;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (added[i].is_none()) continue;
    const Place name = place("grad for ", slots_[i]);
    const ArrayFacts grad = array_facts(added[i], name), sum = array_facts(grads_[i], name);
    const int64_t owner = written_grads_.owner_of_overlap(grad.memory(), hint);
    if (owner != WrittenMemory::kNone) {
      throw py::value_error(name.str() + " shares memory with opt.grads, to which it is added. " +
                            "Pass a copy.");
    }
    all.add(grad.data, grad.dtype, sum.data, sum.dtype, sum.size);
  }
  const WithoutGil no_gil;
  all.run(*isa_.stages, threads_);
}

}  // namespace fused_adam
