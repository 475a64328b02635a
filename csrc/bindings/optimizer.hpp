// What stands behind the Python class Adam: the arrays, their state, and the checks before a step.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../dispatch.hpp"
#include "../overlap.hpp"
#include "../step.hpp"
#include "arrays.hpp"
#include "options.hpp"
#include "structure.hpp"

namespace fused_adam {

class Optimizer {
 public:
  // allocate(params, streams) returns for every array of params a list of `streams` new arrays like
  // it, filled with zeros.
  Optimizer(const std::string& isa, const Threads& threads, py::object allocate);

  // Takes the arrays of a group, makes their state, and appends the group to the caller's list,
  // with the arrays as a flat tuple under "params". grouped: from now on gradients come as a list
  // with an entry for each group. Read-only arrays only where some may be frozen, as in the copy of
  // an optimizer.
  //
  // All of it or nothing, whatever interrupts it: the allocator is the last code of Python that
  // runs, before anything has changed. That is why it takes exclusive use here, not in Python.
  void add_group(const py::object& param_groups, const py::dict& options,
                 std::shared_ptr<const Structure> structure, bool grouped, bool frozen);

  // ValueError or TypeError where param_groups has not the groups that were added, with their
  // params. Needs exclusive use.
  void check_groups(py::handle param_groups) const {
    std::vector<py::dict> dicts;
    groups_in(param_groups, dicts);
  }

  // One step. grads is like params or, if grouped(), a sequence with an entry for each group.
  void step(py::handle grads, py::handle param_groups);

  // Fills gradients with zeros, after the checks of a step.
  void zero(py::handle grads);

  size_t size() const { return ready_; }
  bool grouped() const { return grouped_; }
  // Of each group, in order.
  std::vector<std::shared_ptr<const Structure>> structures() const;
  const char* isa() const { return isa_.name; }
  // {"step": int, "exp_avg": array, ...}, with views of the moments.
  py::dict state(size_t index) const;
  // The next two need exclusive use.
  void set_step(size_t index, int64_t step) { slots_.at(index).step = step; }
  // Makes the stream that amsgrad needs for all of these, where there is none yet, or for none.
  void make_max_exp_avg_sq(const std::vector<size_t>& indices);

  // Exclusive use, as a context manager: RuntimeError where another thread has it.
  void enter();
  void exit() { busy_.store(false, std::memory_order_release); }

 private:
  struct Slot {
    py::object param;
    py::object exp_avg, exp_avg_sq, max_exp_avg_sq;  // the last one may be null
    ArrayFacts state;                                // of exp_avg, which nobody else can change;
                                                     // of param until there is one
    Streams streams;                                 // param and grad: of the step that runs
    int64_t step;
    const void* indexed_data;  // of param, when memory_ was made
    bool mapped;               // is param of a memory map?
    size_t grad_hint;          // for memory_.owner_of_overlap
    size_t group, leaf;        // where its path stands
  };
  struct Group {
    std::shared_ptr<const Structure> structure;
    py::tuple params;
    std::string root, name;  // "params", "param_groups[0]"
    size_t first, count;     // its slots
  };
  class Exclusive;
  class StepScope;

  Place place(const char* role, const Slot& slot) const;
  std::string owner_text(int64_t owner) const;
  // Has the caller's allocator make this many arrays for each of the slots.
  std::vector<std::vector<py::object>> allocate(const std::vector<size_t>& indices,
                                                int streams) const;
  static void set_max_exp_avg_sq(Slot& slot, const py::object& array);
  // Lists all written memory anew; ValueError where two of its arrays overlap.
  void index_memory();
  // Appends the checked dicts of param_groups.
  void groups_in(py::handle param_groups, std::vector<py::dict>& dicts) const;
  void flatten_grads(py::handle grads);
  void check_param(Slot& slot);
  void check_grad(Slot& slot, py::handle array);
  void check_and_plan();
  bool make_missing_maxima();

  const Isa& isa_;
  const Threads threads_;
  const py::object allocate_;
  const OptionReader reader_;
  const py::str params_key_;
  // Of changes to slots_ and groups_, other than by steps, against state() and structures().
  mutable std::mutex slots_mutex_;
  std::vector<Slot> slots_;
  std::atomic<size_t> ready_{0};  // slots that are whole; more while a group is being added
  std::vector<Group> groups_;
  std::atomic<bool> grouped_{false};
  WrittenMemory memory_;  // of all slots, if memory_is_indexed_ and no param has moved since
  bool memory_is_indexed_ = false;
  // Of the step that runs; kept between steps for their memory only.
  StepPlan plan_;
  std::vector<py::object> grads_;
  std::vector<py::dict> dicts_;
  std::vector<HyperParameters> hypers_;
  std::atomic<bool> busy_{false};
};

}  // namespace fused_adam
