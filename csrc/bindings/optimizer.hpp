// What stands behind the Python class Adam: the arrays, their state, and the checks before a step.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../dispatch.hpp"
#include "../overlap.hpp"
#include "../step.hpp"
#include "arrays.hpp"
#include "exclusive.hpp"
#include "options.hpp"
#include "slot.hpp"
#include "structure.hpp"

namespace fused_adam {

class Optimizer {
 public:
  // allow_mixed: gradients of 16 bits for params of float32.
  Optimizer(const std::string& isa, const Threads& threads, bool allow_mixed);

  // Takes a tree of arrays and makes their state. new_groups: the options of each group that it is
  // divided into, mostly one, and which leaves are in it. They are appended to the caller's list,
  // with their arrays as a flat tuple under "params". grouped: from now on gradients come as a list
  // with an entry for each tree. Read-only arrays only where some may be frozen, as in the copy of
  // an optimizer.
  //
  // All of it or nothing, whatever interrupts it: no code of Python runs once something has
  // changed. That is why it takes exclusive use here, not in Python.
  void add_tree(const py::object& param_groups, std::shared_ptr<const Structure> structure,
                const std::vector<std::pair<py::dict, std::vector<size_t>>>& new_groups,
                bool grouped, bool frozen);

  // ValueError or TypeError where param_groups has not the groups that were added, with their
  // params. Needs exclusive use.
  // Or where one says that its moments are stored in another way than they are.
  void check_groups(py::handle param_groups) const;
  // How they are stored: None or a text for each group.
  py::list state_dtypes() const;

  // One step. grads is like params or, if grouped(), a sequence with an entry for each tree.
  // overrides: for this step, in the place of the options of all groups.
  StepReport step(py::handle grads, py::handle param_groups, bool zero_grad, double grad_scale,
                  const OptionOverrides& overrides);
  // How many were made, and how many were skipped.
  int64_t steps() const { return steps_; }
  int64_t skipped_steps() const { return skipped_steps_; }
  void set_skipped_steps(int64_t count) { skipped_steps_ = count; }

  // Adds gradients to others, which are like them, after the checks of a step.
  void accumulate(py::handle sums, py::handle grads);

  // Fills gradients with zeros, after the checks of a step.
  void zero(py::handle grads);

  // How many there are. Parameters are counted over all groups, in their order.
  size_t size() const;
  size_t trees() const;
  size_t groups() const;
  bool grouped() const { return grouped_; }
  // A list for each group: the names of its parameters. None where they are numbers in their order,
  // which say nothing. And how many they are.
  py::list names() const;
  std::vector<size_t> sizes() const;
  const char* isa() const { return isa_.name; }

  // {"step": int, "exp_avg": array, ...}: views of each stream of ours that has values, or what is
  // in it, decoded.
  py::dict state(size_t index) const;
  // {"step": [int, ...], "exp_avg": [array, ...], ...}: the same of all parameters at once, for our
  // own use, as the arrays are the optimizer's own. None where one has no such stream.
  py::dict all_state() const;

  // What parameters and streams are or would be stored as: a dict {"param": ("float32", (3, 4),
  // "C"), "grad": ...} for each kind of parameter, and a list with the number of its kind for each.
  py::tuple kinds() const;
  // {"exp_avg": [array, ...]}: the optimizer's own arrays of the parameters that {"exp_avg":
  // [index, ...]} names, made where there were none: all of them or none. Needs exclusive use.
  py::dict streams(const py::dict& wanted);
  // What state is stored as from now on, as these options of each group say; where that changes,
  // there is none. ValueError where a parameter cannot have that. Needs exclusive use.
  void store_state_as(const std::vector<py::dict>& options);
  // Those that the options of the groups ask for. Needs exclusive use.
  void make_wanted_streams(py::handle param_groups);
  // Takes over step counts and copies of arrays, {"exp_avg": [array or None, ...]}, which have the
  // layouts of their streams; what is not given is as at the beginning. Then updates groups by new
  // options. steps: made so far. All of it or nothing, whatever interrupts it. Needs exclusive use.
  void set_state(const std::vector<int64_t>& step_counts, const py::dict& streams,
                 const std::vector<std::pair<py::dict, py::dict>>& new_options, int64_t steps);

  // The parameters as trees; for each tree, a list of the leaves of each of its groups; buffers for
  // the gradients of the trees from this one on. They need exclusive use.
  py::list params() const;
  py::list members() const;
  py::list new_grads(size_t first_tree) const;

  // The averages of the parameters, as trees of views; None in the place of those of a group that
  // keeps none. One that has not begun is a copy of its param. ValueError where no group keeps any.
  py::list averages(py::handle param_groups);
  // Exchanges every parameter of these groups with its average. Until they are exchanged back, the
  // optimizer can be used for nothing else.
  void use_averages(py::handle param_groups);
  // Where a param cannot be exchanged back, the others are, and the optimizer stays as it was.
  void use_params();

  std::atomic<Use>& use() { return use_; }

 private:
  static constexpr size_t kNoSlot = static_cast<size_t>(-1);

  // What the caller gave as one.
  struct Tree {
    std::shared_ptr<const Structure> structure;
    std::string root;  // "params"
    size_t first;      // of its slots, as many as it has leaves
    // Of each leaf, its slot from there on; empty where that is the order of the leaves.
    std::vector<size_t> order;
  };
  // Parameters of one tree with the same options.
  struct Group {
    py::tuple params;
    std::string name;     // "param_groups[0]"
    size_t first, count;  // its slots
    HyperParameters::StateDType state;
  };
  class StepScope;

  Place place(const char* role, const Slot& slot) const;
  static Place place_in(const Tree& tree, const char* role, size_t leaf);
  // Lists all that may be written, with slots of a tree that is being added, if any; ValueError
  // where two of their arrays overlap.
  void list_memory(WrittenMemory& memory, std::vector<Slot>& added, const Tree* tree);
  void index_memory();
  // Appends the checked dicts of param_groups.
  void groups_in(py::handle param_groups, std::vector<py::dict>& dicts) const;
  [[noreturn]] void refuse_state_dtype(size_t group) const;
  // The checked dicts and their options into dicts_ and hypers_.
  void read_groups(py::handle param_groups, Rates rates);
  // Arrays in the structure of the parameters, one for each slot.
  void flatten_grads(py::handle grads, const char* root, std::vector<py::object>& of_slot) const;
  void flatten_grads(const Tree& tree, py::handle grads, const std::string& root,
                     std::vector<py::object>& of_slot) const;
  py::list unflatten(const std::vector<py::object>& of_slot, size_t first_tree) const;
  void check_layout(Slot& slot);
  void check_param(Slot& slot);
  // role: what messages call it, before the name of its param.
  void check_grad(Slot& slot, py::handle array, const char* role = "grad for ");
  void notice_moved_params();
  // As a step does it on its way: memory_ is of all slots and where their params are now.
  void update_memory();
  // That they can be written, and no two share memory, for a step that has these reasons.
  void check_grads_are_writeable(const char* role, const char* why_written, const char* why_alone);
  bool check_and_plan(const StepWishes& wishes);
  // Of each slot, by the options read last: the streams that it needs, a bit for each.
  std::vector<unsigned> wanted_by_options() const;
  void add_missing(const std::vector<unsigned>& wanted);
  void require_averages() const;
  // The numbers of a stream of that param.
  py::object numbers_of(const ArrayFacts& param, DType stored, const py::object& codes,
                        const py::object& exponents) const;

  const Isa& isa_;
  const Threads threads_;
  const bool allow_mixed_;
  const OptionReader reader_;
  const py::str params_key_;
  // Of changes to slots_, groups_ and trees_, other than by steps, against those that read without
  // exclusive use.
  mutable std::mutex slots_mutex_;
  std::vector<Slot> slots_;
  std::vector<Tree> trees_;
  std::vector<Group> groups_;
  std::atomic<bool> grouped_{false};
  std::atomic<int64_t> steps_{0}, skipped_steps_{0};
  WrittenMemory memory_;  // of all slots, if memory_is_indexed_ and no param has moved since
  bool memory_is_indexed_ = false;
  WrittenMemory written_grads_;  // gradients that this call writes
  // Of the step that runs; kept between steps for their memory only.
  StepPlan plan_;
  std::vector<py::object> grads_;
  std::vector<py::dict> dicts_;
  std::vector<HyperParameters> hypers_;
  std::atomic<Use> use_{Use::kNone};
};

// Exclusive use, and no reference to a gradient is kept afterwards, however the step ends.
class Optimizer::StepScope {
 public:
  explicit StepScope(Optimizer& optimizer) : exclusive_(optimizer.use_), optimizer_(optimizer) {}
  ~StepScope() {
    optimizer_.grads_.clear();
    optimizer_.dicts_.clear();
    optimizer_.hypers_.clear();
    optimizer_.written_grads_.clear();
    optimizer_.plan_.begin({});
  }
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;

  void leave_for(Use next) { exclusive_.leave_for(next); }

 private:
  Exclusive exclusive_;
  Optimizer& optimizer_;
};

}  // namespace fused_adam
