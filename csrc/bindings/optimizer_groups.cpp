// Of class Optimizer: what it was given, as trees of parameters, and the groups of options that
// they are in.
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "containers.hpp"
#include "optimizer.hpp"
#include "text.hpp"

namespace fused_adam {

size_t Optimizer::size() const {
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  return slots_.size();
}

size_t Optimizer::trees() const {
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  return trees_.size();
}

size_t Optimizer::groups() const {
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  return groups_.size();
}

py::list Optimizer::names() const {
  std::vector<std::pair<size_t, std::shared_ptr<const Structure>>> leaves;  // of each slot
  std::vector<size_t> ends;                                                 // of each group
  {
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    for (const Slot& slot : slots_) leaves.emplace_back(slot.leaf, trees_[slot.tree].structure);
    for (const Group& group : groups_) ends.push_back(group.first + group.count);
  }
  py::list all;
  size_t i = 0;
  for (size_t end : ends) {
    const bool named = leaves[i].second->named() || end - i < leaves[i].second->size();
    py::list names;
    for (; i < end; ++i) {
      if (named) names.append(decoded(leaves[i].second->names()[leaves[i].first]));
    }
    all.append(named ? py::object(names) : py::object(py::none()));
  }
  return all;
}

std::vector<size_t> Optimizer::sizes() const {
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  std::vector<size_t> sizes;
  for (const Group& group : groups_) sizes.push_back(group.count);
  return sizes;
}

// --- Given -------------------------------------------------------------------------------------

void Optimizer::add_tree(const py::object& param_groups, std::shared_ptr<const Structure> structure,
                         const std::vector<std::pair<py::dict, std::vector<size_t>>>& new_groups,
                         bool grouped, bool frozen) {
  const Exclusive exclusive(use_);
  const size_t count = structure->size(), first = slots_.size();
  const std::string index = std::to_string(trees_.size());
  // What messages call the params: an expression on what the caller passed.
  const std::string root = grouped ? "param_groups[" + index + "]['params']" : "params";
  if (count == 0) throw py::value_error(root + " has no arrays to train.");
  if (!grouped && !trees_.empty()) throw std::logic_error("several trees need grouped gradients");

  Tree tree = {std::move(structure), root, first, {}};
  std::vector<Group> groups;
  std::vector<Slot> added;
  added.reserve(count);
  std::vector<unsigned> wanted;
  std::vector<size_t> slot_of(count, kNoSlot);
  for (const auto& [options, leaves] : new_groups) {
    if (leaves.empty()) throw std::logic_error("a group of no leaves");
    const size_t number = groups_.size() + groups.size();
    const std::string name = "param_groups[" + std::to_string(number) + "]";
    Rates rates = Rates::not_asked();  // what they are does not matter here
    const HyperParameters hyper = reader_.read(options, name, rates);
    py::tuple params(leaves.size());
    for (size_t i = 0; i < leaves.size(); ++i) params[i] = tree.structure->leaves().at(leaves[i]);
    groups.push_back({params, name, first + added.size(), leaves.size(), hyper.state_dtype});
    for (size_t i = 0; i < leaves.size(); ++i) {
      const size_t leaf = leaves[i];
      if (slot_of[leaf] != kNoSlot) throw std::logic_error("a leaf in two groups");
      slot_of[leaf] = added.size();
      const Place here = place_in(tree, "", leaf);
      added.emplace_back(params[i], here, hyper.state_dtype, number, trees_.size(), leaf);
      wanted.push_back(streams_for(added.back().layout().dtype, wanted_streams(hyper)));
      if (!frozen) {
        require_writeable(params[i], here,
                          "is to be updated in place. Use a.setflags(write=True).");
      }
    }
  }
  if (added.size() != count) throw std::logic_error("a leaf in no group");
  // Seldom another order than that of the leaves.
  if (!std::is_sorted(slot_of.begin(), slot_of.end())) tree.order = std::move(slot_of);
  check_groups(param_groups);
  // Refuses params that overlap, before memory is spent on their state, which overlaps nothing.
  memory_is_indexed_ = false;
  WrittenMemory memory;
  list_memory(memory, added, &tree);
  give_missing(added, slots_mutex_, wanted);
  list_memory(memory, added, &tree);

  {
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    slots_.reserve(first + count);
    groups_.reserve(groups_.size() + groups.size());
    trees_.reserve(trees_.size() + 1);
  }
  py::list dicts;
  for (size_t i = 0; i < groups.size(); ++i) {
    new_groups[i].first[params_key_] = groups[i].params;
    dicts.append(new_groups[i].first);
  }
  const auto end = PyList_GET_SIZE(param_groups.ptr());
  if (PyList_SetSlice(param_groups.ptr(), end, end, dicts.ptr()) != 0) {
    throw py::error_already_set();
  }
  // From here on nothing can fail, and no code of Python runs.
  const std::lock_guard<std::mutex> lock(slots_mutex_);
  std::move(added.begin(), added.end(), std::back_inserter(slots_));
  std::move(groups.begin(), groups.end(), std::back_inserter(groups_));
  trees_.push_back(std::move(tree));
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

void Optimizer::check_groups(py::handle param_groups) const {
  std::vector<py::dict> dicts;
  groups_in(param_groups, dicts);
  for (size_t i = 0; i < dicts.size(); ++i) {
    if (!reader_.has_state_dtype(dicts[i], groups_[i].name, groups_[i].state)) {
      refuse_state_dtype(i);
    }
  }
}

py::list Optimizer::state_dtypes() const {
  py::list names;
  for (const Group& group : groups_) {
    const char* const name = state_dtype_name(group.state);
    names.append(name == nullptr ? py::object(py::none()) : py::str(name));
  }
  return names;
}

void Optimizer::refuse_state_dtype(size_t group) const {
  const char* const name = state_dtype_name(groups_[group].state);
  const std::string stored = name == nullptr ? "None" : "'" + std::string(name) + "'";
  throw py::value_error(groups_[group].name + "['state_dtype'] was changed from " + stored +
                        ", but how moments are stored is fixed when a group is made. Set it back, "
                        "make a new optimizer with the other one, and let that load the "
                        "state_dict() of this one.");
}

void Optimizer::read_groups(py::handle param_groups, Rates rates) {
  dicts_.clear();
  hypers_.clear();
  groups_in(param_groups, dicts_);
  for (size_t i = 0; i < dicts_.size(); ++i) {
    hypers_.push_back(reader_.read(dicts_[i], groups_[i].name, rates));
    if (hypers_[i].state_dtype != groups_[i].state) refuse_state_dtype(i);
  }
}

// --- Between trees and slots -------------------------------------------------------------------

void Optimizer::flatten_grads(py::handle grads, const char* root,
                              std::vector<py::object>& of_slot) const {
  of_slot.clear();
  if (!grouped_) {
    for (const Tree& tree : trees_) flatten_grads(tree, grads, root, of_slot);
    return;
  }
  const std::string expected = std::string(root) + ": expected ";
  const std::string count = std::to_string(trees_.size()) + " param groups, got ";
  if (!PyList_Check(grads.ptr()) && !PyTuple_Check(grads.ptr())) {
    throw py::value_error(expected + "a list with an entry for each of the " + count +
                          Py_TYPE(grads.ptr())->tp_name + ".");
  }
  if (sequence_size(grads) != trees_.size()) {
    throw py::value_error(expected + "an entry for each of the " + count +
                          std::to_string(sequence_size(grads)) + ".");
  }
  for (size_t i = 0; i < trees_.size(); ++i) {
    const py::object entry = sequence_item(grads, i);
    flatten_grads(trees_[i], entry, std::string(root) + "[" + std::to_string(i) + "]", of_slot);
  }
}

void Optimizer::flatten_grads(const Tree& tree, py::handle grads, const std::string& root,
                              std::vector<py::object>& of_slot) const {
  tree.structure->flatten(grads, root, of_slot);
  if (tree.order.empty()) return;
  const auto leaves = of_slot.end() - static_cast<std::ptrdiff_t>(tree.order.size());
  std::vector<py::object> ordered(tree.order.size());
  for (size_t i = 0; i < tree.order.size(); ++i) {
    ordered[tree.order[i]] = std::move(leaves[static_cast<std::ptrdiff_t>(i)]);
  }
  std::move(ordered.begin(), ordered.end(), leaves);
}

py::list Optimizer::unflatten(const std::vector<py::object>& of_slot, size_t first_tree) const {
  py::list trees;
  for (size_t t = first_tree; t < trees_.size(); ++t) {
    const Tree& tree = trees_[t];
    const auto begin = of_slot.begin() + static_cast<std::ptrdiff_t>(tree.first);
    std::vector<py::object> leaves(begin,
                                   begin + static_cast<std::ptrdiff_t>(tree.structure->size()));
    if (!tree.order.empty()) {
      for (size_t i = 0; i < leaves.size(); ++i) leaves[i] = of_slot[tree.first + tree.order[i]];
    }
    trees.append(tree.structure->unflatten(leaves));
  }
  return trees;
}

py::list Optimizer::params() const {
  std::vector<py::object> params;
  for (const Slot& slot : slots_) params.push_back(slot.array(kParam));
  return unflatten(params, 0);
}

py::list Optimizer::members() const {
  std::vector<std::vector<std::vector<size_t>>> all(trees_.size());
  for (const Group& group : groups_) {
    std::vector<size_t> leaves;
    for (size_t i = group.first; i < group.first + group.count; ++i) {
      leaves.push_back(slots_[i].leaf);
    }
    all[slots_[group.first].tree].push_back(std::move(leaves));
  }
  return py::cast(all);
}

py::list Optimizer::new_grads(size_t first_tree) const {
  std::vector<NewArray> wanted;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].tree >= first_tree) wanted.push_back(slots_[i].new_array(kGrad));
  }
  std::vector<py::object> grads(slots_.size() - wanted.size());
  for (const py::object& grad : new_arrays(wanted)) grads.push_back(fresh_view(grad));
  return unflatten(grads, first_tree);
}

}  // namespace fused_adam
