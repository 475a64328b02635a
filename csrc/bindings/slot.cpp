#include "slot.hpp"

#include <string.h>

namespace fused_adam {

Slot::Slot(py::object param, const Place& place, HyperParameters::StateDType state,
           size_t group_index, size_t tree_index, size_t leaf_index)
    : group(group_index),
      tree(tree_index),
      leaf(leaf_index),
      state_(state),
      layout_(array_facts(param, place)) {
  require_state(state, place);
  shape_.assign(layout_.shape, layout_.shape + layout_.nd);
  layout_.shape = shape_.data();  // of our own, which stays where it is when a slot moves
  set(kParam, std::move(param));
}

void Slot::require_state(HyperParameters::StateDType state, const Place& place) const {
  if (state == HyperParameters::kFull || computed_in(layout_.dtype) == kFloat32) return;
  throw py::value_error(place.str() + " has dtype " + dtype_name(layout_.dtype) +
                        ", but state_dtype is for moments in the place of float32 ones. Give it a "
                        "group of its own, with state_dtype=None.");
}

void Slot::store_state_as(HyperParameters::StateDType state, const Place& place) {
  require_state(state, place);
  state_ = state;
  for (const StreamInfo& info : kStreamTable) {
    if (!is_ours(info)) continue;
    arrays_[info.stream] = py::object();
    streams.at[info.stream] = nullptr;
    present_ &= ~(1u << info.stream);
  }
}

void Slot::set(Stream stream, py::object array) {
  streams.at[stream] = py::detail::array_proxy(array.ptr())->data;
  arrays_[stream] = std::move(array);
  present_ |= 1u << stream;
  set_values(stream, kStreamTable[stream].initial != Initial::kCopyOfParam);
}

NewArray Slot::new_array(Stream stream) const {
  ArrayFacts facts = layout_;
  facts.data = py::detail::array_proxy(param().ptr())->data;  // where it is now
  return {facts, storage(), stream};
}

void Slot::begin_state(int64_t steps, unsigned given) {
  step = steps;
  for (const StreamInfo& info : kStreamTable) {
    if (!is_ours(info) || !has(info.stream)) continue;
    const bool is_given = (given >> info.stream & 1u) != 0;
    const int64_t bytes = bytes_of(info.stream, storage(), layout_.size);
    if (!is_given) memset(streams.at[info.stream], 0, static_cast<size_t>(bytes));
    set_values(info.stream, is_given || info.initial == Initial::kZeros);
  }
}

void Slot::add_to(WrittenMemory& memory, int64_t owner) {
  listed_data = py::detail::array_proxy(param().ptr())->data;
  for (const StreamInfo& info : kStreamTable) {
    if (info.access != Access::kUpdated || !has(info.stream)) continue;
    const bool is_param = info.stream == kParam;
    const void* data = is_param ? listed_data : streams.at[info.stream];
    const int64_t bytes = bytes_of(info.stream, storage(), layout_.size);
    memory.add({data, bytes, is_param && layout_.mapped}, owner + info.stream);
  }
}

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

}  // namespace fused_adam
