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

// Makes the streams that these slots do not have, of those that each needs, a bit for each. All of
// them or none. The lock is held only while nothing can run code of Python, which might want it
// too: making an array may collect garbage.
void give_missing(std::vector<Slot>& slots, std::mutex& mutex,
                  const std::vector<unsigned>& wanted) {
  std::vector<std::pair<Slot*, Stream>> places;
  std::vector<NewArray> arrays;
  for (size_t i = 0; i < slots.size(); ++i) {
    const unsigned missing = slots[i].missing(wanted[i]);
    for (int stream = 0; missing >> stream != 0; ++stream) {
      if ((missing >> stream & 1u) == 0) continue;
      places.emplace_back(&slots[i], static_cast<Stream>(stream));
      arrays.push_back(slots[i].new_array(static_cast<Stream>(stream)));
    }
  }
  if (arrays.empty()) return;
  std::vector<py::object> made = new_arrays(arrays);
  const std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < made.size(); ++i)
    places[i].first->set(places[i].second, std::move(made[i]));
}

}  // namespace

Optimizer::Optimizer(const std::string& isa, const Threads& threads)
    : isa_(isa_by_name(isa)), threads_(threads), params_key_("params") {}

Place Optimizer::place(const char* role, const Slot& slot) const {
  return place_in(groups_[slot.group], role, slot.leaf);
}

Place Optimizer::place_in(const Group& group, const char* role, size_t leaf) {
  return {role, group.root, group.structure->paths()[leaf]};
}

size_t Optimizer::size() const {
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  return slots_.size();
}

std::vector<std::shared_ptr<const Structure>> Optimizer::structures() const {
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  std::vector<std::shared_ptr<const Structure>> all;
  for (const Group& group : groups_) all.push_back(group.structure);
  return all;
}

// --- Groups ------------------------------------------------------------------------------------

void Optimizer::add_group(const py::object& param_groups, const py::dict& options,
                          std::shared_ptr<const Structure> structure, bool grouped, bool frozen) {
  const Exclusive exclusive(use_);
  check_groups(param_groups);
  const size_t count = structure->size(), first = slots_.size(), index = groups_.size();
  const std::string name = "param_groups[" + std::to_string(index) + "]";
  // What messages call the params: an expression on what the caller passed.
  const std::string root = grouped ? name + "['params']" : "params";
  if (count == 0) throw py::value_error(root + " has no arrays to train.");
  if (!grouped && index > 0) throw std::logic_error("several groups need grouped gradients");
  const HyperParameters hyper = reader_.read(options, name, steps_);

  py::tuple params(count);
  for (size_t i = 0; i < count; ++i) params[i] = structure->leaves()[i];
  Group group = {std::move(structure), params, root, name, first, count};
  std::vector<Slot> added;
  added.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Place here = place_in(group, "", i);
    added.emplace_back(params[i], here, index, i);
    if (!frozen) {
      require_writeable(params[i], here, "is to be updated in place. Use a.setflags(write=True).");
    }
  }
  // Refuses params that overlap, before memory is spent on their state, which overlaps nothing.
  memory_is_indexed_ = false;
  WrittenMemory memory;
  list_memory(memory, added, &group);
  give_missing(added, slots_mutex_, std::vector<unsigned>(count, wanted_streams(hyper)));
  list_memory(memory, added, &group);

  {
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    slots_.reserve(first + count);
    groups_.reserve(index + 1);
  }
  options[params_key_] = params;
  py::reinterpret_borrow<py::list>(param_groups).append(options);
  // From here on nothing can fail, and no code of Python runs.
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  std::move(added.begin(), added.end(), std::back_inserter(slots_));
  groups_.push_back(std::move(group));
  memory_ = std::move(memory);
  memory_is_indexed_ = true;
  grouped_ = grouped;
}

void Optimizer::groups_in(py::handle param_groups, std::vector<py::dict>& dicts) const {
  if (!PyList_Check(param_groups.ptr())) {
    throw py::type_error("param_groups must be a list, got " +
                         std::string(Py_TYPE(param_groups.ptr())->tp_name) + ".");
  }
  if (sequence_size(param_groups) != groups_.size()) {
    throw py::value_error("param_groups has " + std::to_string(sequence_size(param_groups)) +
                          " groups, but the optimizer was given " + std::to_string(groups_.size()) +
                          ". Use add_param_group to add one.");
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    const py::object entry = sequence_item(param_groups, i);
    if (!PyDict_Check(entry.ptr())) throw py::type_error(groups_[i].name + " must be a dict.");
    if (!dict_item(entry, params_key_).is(groups_[i].params)) {
      throw py::value_error(groups_[i].name +
                            "['params'] was replaced; the arrays of a group are fixed. Use " +
                            "add_param_group, or make a new optimizer.");
    }
    dicts.push_back(py::reinterpret_borrow<py::dict>(entry));
  }
}

void Optimizer::read_groups(py::handle param_groups) {
  dicts_.clear();
  hypers_.clear();
  groups_in(param_groups, dicts_);
  for (size_t i = 0; i < dicts_.size(); ++i) {
    hypers_.push_back(reader_.read(dicts_[i], groups_[i].name, steps_));
  }
}

// --- Memory ------------------------------------------------------------------------------------

void Optimizer::list_memory(WrittenMemory& memory, std::vector<Slot>& added, const Group* group) {
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
    const size_t i = slot_of(owner);
    const Group& of = i < slots_.size() ? groups_[slots_[i].group] : *group;
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
  for (const Slot& slot : slots_) wanted.push_back(wanted_streams(hypers_[slot.group]));
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
  require_like(grad, name, slot.layout(), &param_name);
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

void Optimizer::flatten_grads(py::handle tree, const char* root,
                              std::vector<py::object>& grads) const {
  grads.clear();
  if (!grouped_) {
    for (const Group& group : groups_) group.structure->flatten(tree, root, grads);
    return;
  }
  const std::string expected = std::string(root) + ": expected ";
  const std::string count = std::to_string(groups_.size()) + " param groups, got ";
  if (!PyList_Check(tree.ptr()) && !PyTuple_Check(tree.ptr())) {
    throw py::value_error(expected + "a list with an entry for each of the " + count +
                          Py_TYPE(tree.ptr())->tp_name + ".");
  }
  if (sequence_size(tree) != groups_.size()) {
    throw py::value_error(expected + "an entry for each of the " + count +
                          std::to_string(sequence_size(tree)) + ".");
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    const py::object entry = sequence_item(tree, i);
    groups_[i].structure->flatten(entry, std::string(root) + "[" + std::to_string(i) + "]", grads);
  }
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
    const bool keeps_ema = hypers_[g].keeps_ema();
    const unsigned wanted = wanted_streams(hypers_[g]);
    int64_t step = -1;  // of the rule that was set last; most params share one
    for (size_t i = group.first; i < group.first + group.count; ++i) {
      if (grads_[i].is_none()) continue;
      Slot& slot = slots_[i];
      check_param(slot);
      check_grad(slot, grads_[i]);
      missing |= slot.missing(wanted);
      if (slot.step + 1 != step) {
        step = slot.step + 1;
        plan_.set_rule(hypers_[g], step);
      }
      plan_.add_array(slot.streams, slot.layout().size, slot.layout().dtype,
                      keeps_ema && !slot.has_values(kEma));
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
  read_groups(param_groups);
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
  steps_ += 1;
  for (size_t g = 0; g < groups_.size(); ++g) {
    const bool keeps_ema = hypers_[g].keeps_ema();
    for (size_t i = groups_[g].first; i < groups_[g].first + groups_[g].count; ++i) {
      if (grads_[i].is_none()) continue;
      slots_[i].step += 1;
      if (keeps_ema) slots_[i].set_values(kEma, true);
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
    const ArrayFacts& param = slots_[i].layout();
    const int64_t bytes = bytes_of(kGrad, param.dtype, param.size);
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
    all.add(grad.data, sum.data, sum.size, sum.dtype);
  }
  const WithoutGil no_gil;
  all.run(*isa_.stages, threads_);
}

}  // namespace fused_adam
