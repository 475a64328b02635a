#include "optimizer.hpp"

#include <pybind11/stl.h>
#include <string.h>

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "containers.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

// Owners in WrittenMemory: a stream of a slot.
int64_t owner_of(size_t slot) { return static_cast<int64_t>(slot) * kStreams; }
size_t slot_of(int64_t owner) { return static_cast<size_t>(owner / kStreams); }
bool is_param(int64_t owner) { return owner % kStreams == kParam; }

const char* role_of(int64_t owner) { return is_param(owner) ? "" : "the state of "; }

const StreamInfo& own_stream(const std::string& name) {
  for (const StreamInfo& info : kStreamTable) {
    if (is_ours(info) && info.name == name) return info;
  }
  throw py::value_error("no optimizer has a stream " + name + ".");
}

// Makes the streams that these slots do not have: wanted(i) says which slot i needs, a bit for
// each. All of them or none. The lock is held only while nothing can run code of Python, which
// might want it too: making an array may collect garbage.
template <class Wanted>
void give_missing(std::vector<Slot>& slots, std::mutex& mutex, Wanted wanted) {
  std::vector<std::pair<Slot*, Stream>> places;
  std::vector<NewArray> arrays;
  for (size_t i = 0; i < slots.size(); ++i) {
    const unsigned missing = slots[i].missing(wanted(i));
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

// Holds use_ while it lives. Two steps at once on one optimizer would race; the second is refused.
class Optimizer::Exclusive {
 public:
  explicit Exclusive(Optimizer& optimizer, Use from = Use::kNone)
      : optimizer_(optimizer), next_(from) {
    optimizer_.take(from);
  }
  ~Exclusive() { optimizer_.use_.store(next_, std::memory_order_release); }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

  void leave_for(Use next) { next_ = next; }

 private:
  Optimizer& optimizer_;
  Use next_;
};

// Exclusive use, and no reference to a gradient is kept afterwards, however the step ends.
class Optimizer::StepScope {
 public:
  explicit StepScope(Optimizer& optimizer) : exclusive_(optimizer), optimizer_(optimizer) {}
  ~StepScope() {
    optimizer_.grads_.clear();
    optimizer_.dicts_.clear();
    optimizer_.hypers_.clear();
    optimizer_.cleared_.clear();
    optimizer_.plan_.begin(false);
  }
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

  void leave_for(Use next) { exclusive_.leave_for(next); }

 private:
  Exclusive exclusive_;
  Optimizer& optimizer_;
};

Optimizer::Optimizer(const std::string& isa, const Threads& threads)
    : isa_(isa_by_name(isa)), threads_(threads), params_key_("params") {}

void Optimizer::take(Use from) {
  Use found = from;
  if (use_.compare_exchange_strong(found, Use::kCall, std::memory_order_acquire)) return;
  switch (found) {
    case Use::kCall:
      throw std::runtime_error(
          "this optimizer is in use: by another thread, by a call that this one is part of, or by "
          "a thread that was inside a step when this process was forked. Give each thread an "
          "optimizer of its own, or guard this one with a lock.");
    case Use::kAverages:
      throw std::runtime_error(
          "the averages are in the place of the parameters: inside `with opt.ema_weights()` an "
          "optimizer can do nothing else.");
    case Use::kNone:
      throw std::runtime_error("the averages are not in the place of the parameters.");
  }
}

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
  const Exclusive exclusive(*this);
  check_groups(param_groups);
  const size_t count = structure->size(), first = slots_.size(), index = groups_.size();
  const std::string name = "param_groups[" + std::to_string(index) + "]";
  // What messages call the params: an expression on what the caller passed.
  const std::string root = grouped ? name + "['params']" : "params";
  if (count == 0) throw py::value_error(root + " has no arrays to train.");
  if (!grouped && index > 0) throw std::logic_error("several groups need grouped gradients");
  const HyperParameters hyper = reader_.read(options, name);

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
  list_memory(memory, added, group);
  give_missing(added, slots_mutex_, [wanted = wanted_streams(hyper)](size_t) { return wanted; });
  list_memory(memory, added, group);

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
    hypers_.push_back(reader_.read(dicts_[i], groups_[i].name));
  }
}

// --- Memory ------------------------------------------------------------------------------------

void Optimizer::list_memory(WrittenMemory& memory, std::vector<Slot>& added, const Group& group) {
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
    const Group& of = i < slots_.size() ? groups_[slots_[i].group] : group;
    return place_in(of, role_of(owner), slot(owner).leaf).str();
  };
  const bool same = is_param(a) && is_param(b) && slot(a).param().is(slot(b).param());
  throw py::value_error(text(b) + (same ? " is the same array as " : " shares memory with ") +
                        text(a) + ". Every array that is updated needs memory of its own.");
}

void Optimizer::index_memory() {
  memory_is_indexed_ = false;
  std::vector<Slot> none;
  list_memory(memory_, none, groups_.back());
  memory_is_indexed_ = true;
}

void Optimizer::make_streams(const std::vector<std::pair<size_t, std::string>>& wanted) {
  std::vector<unsigned> of_slot(slots_.size());
  for (const auto& [index, name] : wanted) of_slot.at(index) |= 1u << own_stream(name).stream;
  add_missing([&](size_t i) { return of_slot[i]; });
}

void Optimizer::make_wanted_streams(py::handle param_groups) {
  read_groups(param_groups);
  add_missing([&](size_t i) { return wanted_streams(hypers_[slots_[i].group]); });
}

template <class Wanted>
void Optimizer::add_missing(Wanted wanted) {
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

void Optimizer::check_grad(Slot& slot, py::handle array) {
  const Place name = place("grad for ", slot), param_name = place("", slot);
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

void Optimizer::check_grads_are_clearable(const char* reason) {
  cleared_.clear();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (grads_[i].is_none()) continue;
    const Place name = place("grad for ", slots_[i]);
    require_writeable(grads_[i], name, reason);
    cleared_.add(array_facts(grads_[i], name).memory(), static_cast<int64_t>(i));
  }
  const auto [a, b] = cleared_.index();
  if (a == WrittenMemory::kNone) return;
  const auto text = [&](int64_t i) {
    return place("grad for ", slots_[static_cast<size_t>(i)]).str();
  };
  throw py::value_error(text(b) + " shares memory with " + text(a) +
                        ", and zero_grad=True sets both to zeros, one before the other is used. "
                        "Pass a copy.");
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
// Returns whether streams are missing, of options that were switched on since the last step.
bool Optimizer::check_and_plan(bool zero_grad) {
  plan_.begin(zero_grad);
  memory_.look_again();
  // A grad that is written must not be the new memory of a param that is left out of this step.
  if (zero_grad) notice_moved_params();
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
  if (zero_grad) check_grads_are_clearable("zero_grad=True sets it to zeros.");
  if (memory_is_indexed_) return missing != 0;
  // A param has moved, perhaps onto a grad that was found free before it.
  index_memory();
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!grads_[i].is_none()) check_grad(slots_[i], grads_[i]);
  }
  return missing != 0;
}

// --- Steps -------------------------------------------------------------------------------------

void Optimizer::step(py::handle grads, py::handle param_groups, bool zero_grad) {
  const StepScope scope(*this);
  // What may run code of the caller (a key that compares, a number that converts) comes first.
  flatten_grads(grads);
  read_groups(param_groups);
  if (check_and_plan(zero_grad)) {
    add_missing([&](size_t i) {
      return grads_[i].is_none() ? 0 : wanted_streams(hypers_[slots_[i].group]);
    });
    check_and_plan(zero_grad);
  }
  // From here on nothing can fail.
  {
    const WithoutGil no_gil;
    plan_.run(*isa_.stages, threads_);
  }
  for (size_t g = 0; g < groups_.size(); ++g) {
    const bool keeps_ema = hypers_[g].keeps_ema();
    for (size_t i = groups_[g].first; i < groups_[g].first + groups_[g].count; ++i) {
      if (grads_[i].is_none()) continue;
      slots_[i].step += 1;
      if (keeps_ema) slots_[i].set_values(kEma, true);
    }
  }
}

void Optimizer::zero(py::handle grads) {
  const StepScope scope(*this);
  flatten_grads(grads);
  memory_.look_again();
  notice_moved_params();
  if (!memory_is_indexed_) index_memory();
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

// --- State -------------------------------------------------------------------------------------

py::dict Optimizer::state(size_t index) const {
  int64_t step;
  py::object arrays[kStreams];  // Python code runs below, and may add a group
  {
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    if (index >= slots_.size()) throw py::index_error("no such parameter");
    const Slot& slot = slots_[index];
    step = slot.step;
    for (const StreamInfo& info : kStreamTable) {
      if (is_ours(info) && slot.has_values(info.stream))
        arrays[info.stream] = slot.array(info.stream);
    }
  }
  py::dict state;
  state["step"] = step;
  for (const StreamInfo& info : kStreamTable) {
    if (arrays[info.stream]) state[info.name] = fresh_view(arrays[info.stream]);
  }
  return state;
}

py::dict Optimizer::all_state() const {
  py::dict state;
  py::list steps;
  for (const Slot& slot : slots_) steps.append(slot.step);
  state["step"] = steps;
  for (const StreamInfo& info : kStreamTable) {
    if (!is_ours(info)) continue;
    py::list arrays;
    for (const Slot& slot : slots_) {
      arrays.append(slot.has_values(info.stream) ? slot.array(info.stream) : py::none());
    }
    state[info.name] = arrays;
  }
  return state;
}

py::dict Optimizer::layouts(size_t index) const {
  const ArrayFacts& param = slots_.at(index).layout();
  py::dict layouts;
  for (const StreamInfo& info : kStreamTable) {
    if (!is_ours(info)) continue;
    const std::vector<py::ssize_t> shape = shape_of(info.stream, param);
    layouts[info.name] =
        py::make_tuple(dtype_name(dtype_of(info.stream, param.dtype)), py::tuple(py::cast(shape)));
  }
  return layouts;
}

py::list Optimizer::new_grads(size_t group) const {
  const Group& of = groups_.at(group);
  std::vector<NewArray> wanted;
  for (size_t i = of.first; i < of.first + of.count; ++i) {
    wanted.push_back(slots_[i].new_array(kGrad));
  }
  py::list grads;
  for (const py::object& grad : new_arrays(wanted)) grads.append(fresh_view(grad));
  return grads;
}

py::list Optimizer::averages(py::handle param_groups) {
  const StepScope scope(*this);
  read_groups(param_groups);
  require_averages();
  add_missing([&](size_t i) { return wanted_streams(hypers_[slots_[i].group]); });
  py::list all;
  for (size_t g = 0; g < groups_.size(); ++g) {
    py::list views;
    for (size_t i = groups_[g].first; i < groups_[g].first + groups_[g].count; ++i) {
      Slot& slot = slots_[i];
      if (!hypers_[g].keeps_ema()) {
        views.append(py::none());
        continue;
      }
      if (!slot.has_values(kEma)) {
        check_layout(slot);
        const int64_t bytes = bytes_of(kEma, slot.layout().dtype, slot.layout().size);
        memcpy(slot.streams.at[kEma], slot.streams.at[kParam], static_cast<size_t>(bytes));
      }
      views.append(fresh_view(slot.array(kEma)));
    }
    all.append(views);
  }
  return all;
}

void Optimizer::reset_state(size_t index, int64_t step, const std::vector<std::string>& present) {
  Slot& slot = slots_.at(index);
  slot.step = step;
  for (const StreamInfo& info : kStreamTable) {
    if (!is_ours(info) || !slot.has(info.stream)) continue;
    const bool there = std::find(present.begin(), present.end(), info.name) != present.end();
    const ArrayFacts& param = slot.layout();
    const int64_t bytes = bytes_of(info.stream, param.dtype, param.size);
    if (!there) memset(slot.streams.at[info.stream], 0, static_cast<size_t>(bytes));
    slot.set_values(info.stream, there || info.initial == Initial::kZeros);
  }
}

// --- Averages in the place of parameters -------------------------------------------------------

namespace {

void exchange(Slot& slot) {
  char* const param = static_cast<char*>(slot.streams.at[kParam]);
  char* const ema = static_cast<char*>(slot.streams.at[kEma]);
  std::swap_ranges(param, param + bytes_of(kEma, slot.layout().dtype, slot.layout().size), ema);
  slot.holds_average = !slot.holds_average;
}

}  // namespace

void Optimizer::require_averages() const {
  if (std::none_of(hypers_.begin(), hypers_.end(), [](auto& h) { return h.keeps_ema(); })) {
    throw py::value_error("there are no averages: Adam(..., ema_decay=0.999) keeps them.");
  }
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
  }
  if (!memory_is_indexed_) index_memory();
  const WithoutGil no_gil;
  for (Slot& slot : slots_) {
    if (differs(slot)) exchange(slot);
  }
  scope.leave_for(Use::kAverages);
}

void Optimizer::use_params() {
  Exclusive exclusive(*this, Use::kAverages);
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
    exchange(slot);
  }
  if (problem) std::rethrow_exception(problem);
  exclusive.leave_for(Use::kNone);
}

}  // namespace fused_adam
