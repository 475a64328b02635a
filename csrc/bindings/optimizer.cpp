#include "optimizer.hpp"

#include <string.h>

#include <algorithm>
#include <utility>

#include "containers.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

// Owners in WrittenMemory: the param of a slot, or its state.
int64_t param_owner(size_t slot) { return static_cast<int64_t>(2 * slot); }
int64_t state_owner(size_t slot) { return static_cast<int64_t>(2 * slot + 1); }

void* data_of(const py::object& array) { return py::detail::array_proxy(array.ptr())->data; }

}  // namespace

// Holds busy_ while it lives. Two steps at once on one optimizer would race; the second is refused.
class Optimizer::Exclusive {
 public:
  explicit Exclusive(Optimizer& optimizer) : optimizer_(optimizer) { optimizer_.enter(); }
  ~Exclusive() { optimizer_.exit(); }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

 private:
  Optimizer& optimizer_;
};

// Exclusive use, and no reference to a gradient is kept afterwards, however the step ends.
class Optimizer::StepScope {
 public:
  explicit StepScope(Optimizer& optimizer) : exclusive_(optimizer), optimizer_(optimizer) {}
  ~StepScope() {
    optimizer_.grads_.clear();
    optimizer_.dicts_.clear();
    optimizer_.hypers_.clear();
    optimizer_.plan_.clear();
  }
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

 private:
  Exclusive exclusive_;
  Optimizer& optimizer_;
};

Optimizer::Optimizer(const std::string& isa, const Threads& threads, py::object allocate)
    : isa_(isa_by_name(isa)),
      threads_(threads),
      allocate_(std::move(allocate)),
      params_key_("params") {}

void Optimizer::enter() {
  if (busy_.exchange(true, std::memory_order_acquire)) {
    throw std::runtime_error(
        "this optimizer is in use: by another thread, by a call that this one is part of, or by a "
        "thread that was inside a step when this process was forked. Give each thread an optimizer "
        "of its own, or guard this one with a lock.");
  }
}

Place Optimizer::place(const char* role, const Slot& slot) const {
  const Group& group = groups_[slot.group];
  return {role, group.root, group.structure->paths()[slot.leaf]};
}

std::string Optimizer::owner_text(int64_t owner) const {
  const bool is_state = owner % 2 != 0;
  return place(is_state ? "the state of " : "", slots_[static_cast<size_t>(owner / 2)]).str();
}

void Optimizer::add_group(const py::object& param_groups, const py::dict& options,
                          std::shared_ptr<const Structure> structure, bool grouped, bool frozen) {
  const Exclusive exclusive(*this);
  check_groups(param_groups);
  const size_t count = structure->size(), first = slots_.size(), index = groups_.size();
  const std::string name = "param_groups[" + std::to_string(index) + "]";
  // What messages call the params: an expression on what the caller passed.
  const std::string root = grouped ? name + "['params']" : "params";
  if (count == 0) throw py::value_error(root + " has no arrays to train.");
  if (!grouped && index > 0) throw std::logic_error("several groups need grouped gradients");
  const bool amsgrad = reader_.read(options, name).amsgrad;
  py::tuple params(count);
  for (size_t i = 0; i < count; ++i) params[i] = structure->leaves()[i];

  {
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    groups_.push_back({std::move(structure), params, root, name, first, count});
  }
  try {
    std::vector<size_t> indices;
    for (size_t i = 0; i < count; ++i) {
      Slot slot = {};
      slot.param = params[i];
      slot.group = index;
      slot.leaf = i;
      const Place name = place("", slot);
      slot.state = array_facts(slot.param, name);
      slot.mapped = slot.state.mapped;
      if (!frozen) {
        require_writeable(slot.param, name,
                          "is to be updated in place. Use a.setflags(write=True).");
      }
      indices.push_back(first + i);
      const std::lock_guard<std::mutex> lock(slots_mutex_);
      slots_.push_back(std::move(slot));
    }
    index_memory();  // refuses params that overlap, before memory is spent on their state
    const auto arrays = allocate(indices, amsgrad ? 3 : 2);
    for (size_t i = 0; i < count; ++i) {
      Slot& slot = slots_[first + i];
      slot.exp_avg = arrays[i][0];
      slot.exp_avg_sq = arrays[i][1];
      slot.state = array_facts(slot.exp_avg, place("the state of ", slot));
      slot.streams.exp_avg = data_of(slot.exp_avg);
      slot.streams.exp_avg_sq = data_of(slot.exp_avg_sq);
      if (amsgrad) set_max_exp_avg_sq(slot, arrays[i][2]);
    }
    index_memory();
    // A dict with texts for keys and a list: nothing of this runs code of Python.
    options[params_key_] = params;
    py::reinterpret_borrow<py::list>(param_groups).append(options);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    slots_.resize(first);
    groups_.pop_back();
    memory_is_indexed_ = false;
    throw;
  }
  ready_ = slots_.size();
  grouped_ = grouped;
}

std::vector<std::shared_ptr<const Structure>> Optimizer::structures() const {
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  std::vector<std::shared_ptr<const Structure>> all;
  for (const Group& group : groups_) {
    if (group.first + group.count <= ready_) all.push_back(group.structure);
  }
  return all;
}

std::vector<std::vector<py::object>> Optimizer::allocate(const std::vector<size_t>& indices,
                                                         int streams) const {
  py::list params;
  for (const size_t i : indices) params.append(slots_[i].param);
  const py::list made = allocate_(params, streams);
  std::vector<std::vector<py::object>> arrays;
  for (size_t i = 0; i < indices.size(); ++i) {
    const Slot& slot = slots_[indices[i]];
    const Place name = place("the state of ", slot);
    // While Python code ran, another thread may have given the param another shape.
    const ArrayFacts like = slot.exp_avg ? slot.state : array_facts(slot.param, place("", slot));
    arrays.emplace_back();
    for (py::handle array : made[i]) {
      require_like(array_facts(array, name), name, like, place("", slot));
      require_writeable(array, name, "a step updates it in place.");
      arrays.back().push_back(py::reinterpret_borrow<py::object>(array));
    }
  }
  return arrays;
}

void Optimizer::make_max_exp_avg_sq(const std::vector<size_t>& indices) {
  std::vector<size_t> missing;
  for (const size_t i : indices) {
    if (!slots_.at(i).max_exp_avg_sq) missing.push_back(i);
  }
  if (missing.empty()) return;
  const auto arrays = allocate(missing, 1);
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  for (size_t i = 0; i < missing.size(); ++i) set_max_exp_avg_sq(slots_[missing[i]], arrays[i][0]);
  memory_is_indexed_ = false;
}

void Optimizer::set_max_exp_avg_sq(Slot& slot, const py::object& array) {
  slot.max_exp_avg_sq = array;
  slot.streams.max_exp_avg_sq = data_of(array);
}

void Optimizer::index_memory() {
  memory_is_indexed_ = false;
  memory_.clear();
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    slot.indexed_data = data_of(slot.param);
    memory_.add({slot.indexed_data, slot.state.bytes(), slot.mapped}, param_owner(i));
    for (void* moment :
         {slot.streams.exp_avg, slot.streams.exp_avg_sq, slot.streams.max_exp_avg_sq}) {
      if (moment != nullptr) memory_.add({moment, slot.state.bytes(), false}, state_owner(i));
    }
  }
  const auto [a, b] = memory_.index();
  if (a == WrittenMemory::kNone) {
    memory_is_indexed_ = true;
    return;
  }
  const auto param_of = [&](int64_t owner) { return slots_[static_cast<size_t>(owner / 2)].param; };
  const bool same = a % 2 == 0 && b % 2 == 0 && param_of(a).is(param_of(b));
  throw py::value_error(owner_text(b) + (same ? " is the same array as " : " shares memory with ") +
                        owner_text(a) + ". Every array that is updated needs memory of its own.");
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

void Optimizer::check_param(Slot& slot) {
  const Place name = place("", slot);
  const ArrayFacts param = array_facts(slot.param, name);
  require_like(param, name, slot.state, place("the state of ", slot));
  require_writeable(slot.param, name,
                    "a step updates it in place. Use a.setflags(write=True), or leave it out: None "
                    "as its grad.");
  if (param.data != slot.indexed_data) memory_is_indexed_ = false;
  slot.streams.param = param.data;
}

void Optimizer::check_grad(Slot& slot, py::handle array) {
  const Place name = place("grad for ", slot);
  const ArrayFacts grad = array_facts(array, name);
  require_like(grad, name, slot.state, place("", slot));
  int64_t owner = memory_.owner_of_overlap(grad.memory(), slot.grad_hint);
  if (owner != WrittenMemory::kNone) {
    // A param that is left out of this step may have moved since, and its old memory be this grad.
    index_memory();
    owner = memory_.owner_of_overlap(grad.memory(), slot.grad_hint);
  }
  if (owner != WrittenMemory::kNone) {
    throw py::value_error(name.str() + " shares memory with " + owner_text(owner) +
                          ", which a step writes. Pass a copy.");
  }
  slot.streams.grad = grad.data;
}

void Optimizer::flatten_grads(py::handle grads) {
  grads_.clear();
  if (!grouped_) {
    for (const Group& group : groups_) group.structure->flatten(grads, "grads", grads_);
    return;
  }
  if (!PyList_Check(grads.ptr()) && !PyTuple_Check(grads.ptr())) {
    throw py::value_error("grads: expected a list with an entry for each of the " +
                          std::to_string(groups_.size()) + " param groups, got " +
                          Py_TYPE(grads.ptr())->tp_name + ".");
  }
  if (sequence_size(grads) != groups_.size()) {
    throw py::value_error("grads: expected an entry for each of the " +
                          std::to_string(groups_.size()) + " param groups, got " +
                          std::to_string(sequence_size(grads)) + ".");
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    const py::object tree = sequence_item(grads, i);
    groups_[i].structure->flatten(tree, "grads[" + std::to_string(i) + "]", grads_);
  }
}

// One pass over all arrays, since what a step knows of 1000 arrays no longer fits the first cache.
void Optimizer::check_and_plan() {
  plan_.clear();
  memory_.look_again();
  for (size_t g = 0; g < groups_.size(); ++g) {
    const Group& group = groups_[g];
    int64_t step = -1;  // of the rule that was set last; most params share one
    for (size_t i = group.first; i < group.first + group.count; ++i) {
      if (grads_[i].is_none()) continue;
      Slot& slot = slots_[i];
      check_param(slot);
      check_grad(slot, grads_[i]);
      if (slot.step + 1 != step) {
        step = slot.step + 1;
        plan_.set_rule(hypers_[g], step);
      }
      plan_.add_array(slot.streams, slot.state.size, slot.state.dtype);
    }
  }
  if (memory_is_indexed_) return;
  // A param has moved, perhaps onto a grad that was found free before it.
  index_memory();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!grads_[i].is_none()) check_grad(slots_[i], grads_[i]);
  }
}

// Where amsgrad was switched on since the last step, the maximum counts from now.
bool Optimizer::make_missing_maxima() {
  std::vector<size_t> missing;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    const bool needed = hypers_[slot.group].amsgrad && !grads_[i].is_none();
    if (needed && !slot.max_exp_avg_sq) missing.push_back(i);
  }
  make_max_exp_avg_sq(missing);
  return !missing.empty();
}

void Optimizer::step(py::handle grads, py::handle param_groups) {
  const StepScope scope(*this);
  // What may run code of the caller (a key that compares, a number that converts) comes first.
  flatten_grads(grads);
  groups_in(param_groups, dicts_);
  for (size_t i = 0; i < dicts_.size(); ++i) {
    hypers_.push_back(reader_.read(dicts_[i], groups_[i].name));
  }
  check_and_plan();
  // The allocator is Python code, during which other threads run: what was checked is checked
  // again.
  if (make_missing_maxima()) check_and_plan();
  // From here on nothing can fail.
  {
    const WithoutGil no_gil;
    plan_.run(*isa_.kernels, threads_);
  }
  for (size_t i = 0; i < slots_.size(); ++i) slots_[i].step += grads_[i].is_none() ? 0 : 1;
}

void Optimizer::zero(py::handle grads) {
  const StepScope scope(*this);
  flatten_grads(grads);
  memory_.look_again();
  for (const Slot& slot : slots_) memory_is_indexed_ &= data_of(slot.param) == slot.indexed_data;
  if (!memory_is_indexed_) index_memory();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (grads_[i].is_none()) continue;
    check_grad(slots_[i], grads_[i]);
    require_writeable(grads_[i], place("grad for ", slots_[i]), "zero_grad() fills it.");
  }
  const WithoutGil no_gil;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (grads_[i].is_none()) continue;
    void* const grad = const_cast<void*>(slots_[i].streams.grad);
    memset(grad, 0, static_cast<size_t>(slots_[i].state.bytes()));
  }
}

py::dict Optimizer::state(size_t index) const {
  Slot slot;
  {
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    if (index >= ready_) throw py::index_error("no such parameter");
    slot = slots_[index];  // a copy: Python code runs below, and may add a group
  }
  py::dict state;
  state["step"] = slot.step;
  state["exp_avg"] = fresh_view(slot.exp_avg);
  state["exp_avg_sq"] = fresh_view(slot.exp_avg_sq);
  if (slot.max_exp_avg_sq) state["max_exp_avg_sq"] = fresh_view(slot.max_exp_avg_sq);
  return state;
}

}  // namespace fused_adam
