// Of class Optimizer: what belongs to its parameters, shown, made and written from outside.
#include <pybind11/stl.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "../float_mode.hpp"
#include "../tiles.hpp"
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
bool is_like_stream(const ArrayFacts& array, Stream stream, const Slot& slot) {
  const std::vector<py::ssize_t> shape = shape_of(stream, slot.layout(), slot.storage());
  return array.dtype == dtype_of(stream, slot.storage()) &&
         std::equal(shape.begin(), shape.end(), array.shape, array.shape + array.nd) &&
         (slot.layout().c_contiguous ? array.c_contiguous : array.f_contiguous);
}

// Or as its numbers are, which are encoded?
bool is_like_numbers(const ArrayFacts& array, const ArrayFacts& param) {
  return array.dtype == computed_in(param.dtype) &&
         std::equal(param.shape, param.shape + param.nd, array.shape, array.shape + array.nd) &&
         (param.c_contiguous ? array.c_contiguous : array.f_contiguous);
}

bool is_scale(Stream stream) { return kStreamTable[stream].elements_per_entry != 1; }

py::tuple layout_of(Stream stream, const Slot& slot) {
  const DType dtype = dtype_of(stream, slot.storage());
  const std::vector<py::ssize_t> shape = shape_of(stream, slot.layout(), slot.storage());
  return py::make_tuple(dtype_name(dtype), py::tuple(py::cast(shape)),
                        slot.layout().c_contiguous ? "C" : "F");
}

}  // namespace

py::dict Optimizer::state(size_t index) const {
  int64_t step;
  py::object arrays[kStreams];  // Python code runs below, and may add a group
  ArrayFacts param;
  Storage storage;
  std::vector<py::ssize_t> shape;
  {
    const std::lock_guard<std::mutex> lock(slots_mutex_);
    if (index >= slots_.size()) throw py::index_error("no such parameter");
    const Slot& slot = slots_[index];
    step = slot.step;
    param = slot.layout();
    storage = slot.storage();
    shape.assign(param.shape, param.shape + param.nd);
    for (const StreamInfo& info : kStreamTable) {
      if (is_ours(info) && slot.has_values(info.stream))
        arrays[info.stream] = slot.array(info.stream);
    }
  }
  param.shape = shape.data();
  py::dict state;
  state["step"] = step;
  for (const StreamInfo& info : kStreamTable) {
    const py::object& array = arrays[info.stream];
    if (!array || is_scale(info.stream)) continue;
    const DType stored = dtype_of(info.stream, storage);
    if (is_in_blocks(stored) && !arrays[scale_of(info.stream)]) continue;
    state[info.name] = is_coded(stored)
                           ? numbers_of(param, stored, array, arrays[scale_of(info.stream)])
                           : fresh_view(array);
  }
  return state;
}

py::object Optimizer::numbers_of(const ArrayFacts& param, DType stored, const py::object& codes,
                                 const py::object& exponents) const {
  py::array numbers = new_numbers(param);
  void* const to = py::detail::array_proxy(numbers.ptr())->data;
  const void* const from = py::detail::array_proxy(codes.ptr())->data;
  const void* const scale = exponents ? py::detail::array_proxy(exponents.ptr())->data : nullptr;
  {
    const WithoutGil no_gil;
    const DefaultFloatMode mode;
    decode(*isa_.stages, stored, from, scale, to, param.size);
  }
  numbers.attr("setflags")(py::arg("write") = false);
  return numbers;
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
    key.assign({param.dtype, param.c_contiguous, slot.storage().state});
    key.insert(key.end(), param.shape, param.shape + param.nd);
    const auto [number, is_new] = numbers.emplace(key, numbers.size());
    of_param.append(number->second);
    if (!is_new) continue;
    py::dict layouts;
    for (const StreamInfo& info : kStreamTable) {
      layouts[info.name] = layout_of(info.stream, slot);
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

void Optimizer::store_state_as(const std::vector<py::dict>& options) {
  if (options.size() != groups_.size()) throw std::logic_error("another number of groups");
  memory_is_indexed_ = false;
  Rates rates = Rates::not_asked();
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    const HyperParameters hyper = reader_.read(options[g], group.name, rates);
    if (hyper.state_dtype == group.state) continue;
    for (size_t i = group.first; i < group.first + group.count; ++i) {
      const std::lock_guard<std::mutex> lock(slots_mutex_);
      slots_[i].store_state_as(hyper.state_dtype, place("", slots_[i]));
    }
    group.state = hyper.state_dtype;
  }
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
    bool encodes;
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
      const DType stored = dtype_of(stream, slots_[i].storage());
      const ArrayFacts array = array_facts(arrays[i], here, stored);
      const bool as_stored = is_like_stream(array, stream, slots_[i]);
      const bool encodes =
          !as_stored && is_coded(stored) && is_like_numbers(array, slots_[i].layout());
      if (!as_stored && !encodes) throw py::value_error(here.str() + " has another layout.");
      given[i] |= 1u << stream;
      if (encodes && is_in_blocks(stored)) given[i] |= 1u << scale_of(stream);
      sources.push_back({arrays[i], stream, i, encodes});
    }
  }
  add_missing(given);
  // From here on nothing can fail, and no code of Python runs: options that are texts are compared
  // by no method of theirs.
  {
    const WithoutGil no_gil;
    const DefaultFloatMode mode;
    for (const Source& source : sources) {
      Slot& slot = slots_[source.slot];
      const void* const from = py::detail::array_proxy(source.array.ptr())->data;
      void* const to = slot.streams.at[source.stream];
      const int64_t size = slot.layout().size;
      if (source.encodes) {
        const auto moment = static_cast<uint32_t>(source.stream - kExpAvg);
        encode(*isa_.stages, dtype_of(source.stream, slot.storage()), from, to,
               slot.streams.at[scale_of(source.stream)], 0, size,
               moment_dither(moment, step_counts[source.slot]));
      } else if (from != to) {
        memcpy(to, from, static_cast<size_t>(bytes_of(source.stream, slot.storage(), size)));
      }
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
