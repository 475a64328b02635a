// One parameter with all memory that belongs to it.
#pragma once

#include <pybind11/pybind11.h>

#include <stdint.h>

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../overlap.hpp"
#include "../stream_table.hpp"
#include "arrays.hpp"
#include "memory.hpp"

namespace fused_adam {

namespace py = pybind11;

class Slot {
 public:
  // tree, leaf: where its path stands. TypeError or ValueError where param is not taken, or its
  // moments cannot be stored like that.
  Slot(py::object param, const Place& place, HyperParameters::StateDType state, size_t group,
       size_t tree, size_t leaf);

  py::handle param() const { return arrays_[kParam]; }
  // What param was when it was taken: what it is now has to be the same.
  const ArrayFacts& layout() const { return layout_; }
  Storage storage() const { return {layout_.dtype, state_}; }
  // Has no state from then on, which is stored like that.
  void store_state_as(HyperParameters::StateDType state, const Place& place);
  bool has(Stream stream) const { return (present_ >> stream & 1u) != 0; }
  // Of these streams, a bit for each, those that are not there.
  unsigned missing(unsigned wanted) const { return wanted & ~present_; }
  const py::object& array(Stream stream) const { return arrays_[stream]; }
  void set(Stream stream, py::object array);

  // What to make for a stream of this parameter.
  NewArray new_array(Stream stream) const;

  // A stream that begins as a copy of param has no values before its first step.
  bool has_values(Stream stream) const { return (missing_values() >> stream & 1u) == 0; }
  void set_values(Stream stream, bool there) {
    awaited_ = there ? awaited_ & ~(1u << stream) : awaited_ | 1u << stream;
  }
  // Of these streams, a bit for each, those that a step begins as copies of param; and when it did.
  unsigned beginning(unsigned wanted) const {
    return wanted & missing_values() & copies_of_param();
  }
  void have_begun(unsigned these) { awaited_ &= ~these; }

  // As loaded: this many steps, and values in these streams, a bit for each. The others are as at
  // the beginning.
  void begin_state(int64_t steps, unsigned given);

  // Lists what a step may write. owner: its number for the first stream, counted on from there.
  void add_to(WrittenMemory& memory, int64_t owner);

  Streams streams = {};         // param and grad: of the step that runs
  DType grad_dtype = kFloat32;  // of the step that runs
  int64_t step = 0;
  const void* listed_data = nullptr;  // of param, by the last add_to
  size_t grad_hint = 0;               // for WrittenMemory::owner_of_overlap
  bool holds_average = false;         // param, whose values are in its average meanwhile
  std::vector<char> kept_param;       // meanwhile, where the average cannot take its place
  size_t group, tree, leaf;

 private:
  unsigned missing_values() const { return ~present_ | awaited_; }

  void require_state(HyperParameters::StateDType state, const Place& place) const;

  unsigned present_ = 0, awaited_ = 0;  // a bit for each stream
  HyperParameters::StateDType state_;
  ArrayFacts layout_;
  py::object arrays_[kStreams];  // null where there is none; no grad
  std::vector<py::ssize_t> shape_;
};

// Makes the streams that these slots do not have, of those that each needs, a bit for each. All of
// them or none. The lock is held only while nothing can run code of Python, which might want it
// too: making an array may collect garbage.
void give_missing(std::vector<Slot>& slots, std::mutex& mutex, const std::vector<unsigned>& wanted);

}  // namespace fused_adam
