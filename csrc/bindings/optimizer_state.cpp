// Of class Optimizer: what belongs to its parameters, shown, made and written from outside.
#include <pybind11/stl.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <string>

#include "optimizer.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

const StreamInfo& own_stream(const std::string& name) {
  for (const StreamInfo& info : kStreamTable) {
    if (is_ours(info) && info.name == name) return info;
  }
  throw py::value_error("no optimizer has a stream " + name + ".");
}

// Is it as the stream of this parameter is, or would be?
bool is_like_stream(const ArrayFacts& array, Stream stream, const ArrayFacts& param) {
  const std::vector<py::ssize_t> shape = shape_of(stream, param);
  return array.dtype == dtype_of(stream, param.dtype) &&
         std::equal(shape.begin(), shape.end(), array.shape, array.shape + array.nd) &&
         (param.c_contiguous ? array.c_contiguous : array.f_contiguous);
}

py::tuple layout_of(Stream stream, const ArrayFacts& param) {
  const DType dtype = dtype_of(stream, param.dtype);
  return py::make_tuple(dtype_name(dtype), py::tuple(py::cast(shape_of(stream, param))),
                        param.c_contiguous ? "C" : "F");
}

}  // namespace

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

py::tuple Optimizer::kinds() const {
  py::list kinds, of_param;
  std::map<std::vector<py::ssize_t>, size_t> numbers;
  std::vector<py::ssize_t> key;
  for (const Slot& slot : slots_) {
    const ArrayFacts& param = slot.layout();
    key.assign({param.dtype, param.c_contiguous});
    key.insert(key.end(), param.shape, param.shape + param.nd);
    const auto [number, is_new] = numbers.emplace(key, numbers.size());
    of_param.append(number->second);
    if (!is_new) continue;
    py::dict layouts;
    for (const StreamInfo& info : kStreamTable) {
      if (is_ours(info) || info.stream == kParam) {
        layouts[info.name] = layout_of(info.stream, param);
      }
    }
    kinds.append(layouts);
  }
  return py::make_tuple(kinds, of_param);
}

py::dict Optimizer::streams(const py::dict& wanted) {
  std::vector<std::pair<Stream, std::vector<size_t>>> all;
  std::vector<unsigned> of_slot(slots_.size());
  for (const auto& [name, indices] : wanted) {
    const Stream stream = own_stream(name.cast<std::string>()).stream;
    all.emplace_back(stream, indices.cast<std::vector<size_t>>());
    for (size_t i : all.back().second) of_slot.at(i) |= 1u << stream;
  }
  add_missing(of_slot);
  py::dict arrays;
  for (const auto& [stream, indices] : all) {
    py::list list;
    for (size_t i : indices) list.append(slots_[i].array(stream));
    arrays[kStreamTable[stream].name] = list;
  }
  return arrays;
}

void Optimizer::make_wanted_streams(py::handle param_groups) {
  read_groups(param_groups, Rates::not_asked());
  add_missing(wanted_by_options());
  dicts_.clear();
  hypers_.clear();
}

void Optimizer::set_state(const std::vector<int64_t>& step_counts, const py::dict& streams,
                          const std::vector<std::pair<py::dict, py::dict>>& new_options,
                          int64_t steps) {
  const size_t count = slots_.size();
  const auto require_count = [count](size_t found) {
    if (found != count) throw py::value_error("state of another number of parameters.");
  };
  require_count(step_counts.size());
  struct Source {
    py::object array;  // held: others may change the list that it came in
    Stream stream;
    size_t slot;
  };
  std::vector<Source> sources;
  std::vector<unsigned> given(count);
  for (const auto& [name, list] : streams) {
    const Stream stream = own_stream(name.cast<std::string>()).stream;
    const auto arrays = list.cast<std::vector<py::object>>();
    require_count(arrays.size());
    for (size_t i = 0; i < count; ++i) {
      if (arrays[i].is_none()) continue;
      const Place here = place("the new state of ", slots_[i]);
      if (!is_like_stream(array_facts(arrays[i], here), stream, slots_[i].layout())) {
        throw py::value_error(here.str() + " has another layout.");
      }
      given[i] |= 1u << stream;
      sources.push_back({arrays[i], stream, i});
    }
  }
  add_missing(given);
  // From here on nothing can fail, and no code of Python runs: options that are texts are compared
  // by no method of theirs.
  {
    const WithoutGil no_gil;
    for (const Source& source : sources) {
      Slot& slot = slots_[source.slot];
      const void* const from = py::detail::array_proxy(source.array.ptr())->data;
      void* const to = slot.streams.at[source.stream];
      const int64_t bytes = bytes_of(source.stream, slot.layout().dtype, slot.layout().size);
      if (from != to) memcpy(to, from, static_cast<size_t>(bytes));
    }
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    for (size_t i = 0; i < count; ++i) slots_[i].begin_state(step_counts[i], given[i]);
    steps_ = steps;
  }
  for (const auto& [group, options] : new_options) {
    if (PyDict_Update(group.ptr(), options.ptr()) != 0) throw py::error_already_set();
  }
}

}  // namespace fused_adam
