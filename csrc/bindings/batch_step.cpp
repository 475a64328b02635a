#include "batch_step.hpp"

#include <algorithm>
#include <stdexcept>

#include "containers.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

std::string path_of(size_t group, size_t index) {
  return "param_groups[" + std::to_string(group) + "]['params'][" + std::to_string(index) + "]";
}

std::string shape_text(const Block& block) {
  std::string text = "(";
  for (int i = 0; i < block.nd; ++i) text += (i > 0 ? ", " : "") + std::to_string(block.shape[i]);
  return text + (block.nd == 1 ? ",)" : ")");
}

bool same_shape(const Block& a, const Block& b) {
  return a.nd == b.nd && std::equal(a.shape, a.shape + a.nd, b.shape);
}

}  // namespace

// However a step ends, it refers to nothing of the caller afterwards.
class BatchStep::Scope {
 public:
  explicit Scope(BatchStep& step) : exclusive_(step.use_), step_(step) { clear(); }
  ~Scope() { clear(); }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  void clear() {
    step_.written_.clear();
    step_.memories_.clear();
    step_.grads_.clear();
    step_.streams_.clear();
    step_.counts_.clear();
    step_.places_.clear();
    step_.plan_.begin({});
  }

  Exclusive exclusive_;
  BatchStep& step_;
};

BatchStep::BatchStep(const std::string& isa, const Threads& threads, const py::object& tensor_type)
    : isa_(isa_by_name(isa)), threads_(threads), reader_(tensor_type) {}

std::string BatchStep::name_of(int64_t owner) const {
  const auto [group, index] = places_.at(static_cast<size_t>(owner / kStreams));
  const auto stream = static_cast<Stream>(owner % kStreams);
  const std::string path = path_of(group, index);
  return stream == kParam ? path : std::string(kStreamTable[stream].name) + " of " + path;
}

// Messages of what it throws begin with the parameter's place; see plan_group.
void BatchStep::plan_param(size_t index, const Group& group, const HyperParameters& hyper,
                           unsigned wanted, bool allow_mixed, int64_t& planned_step) {
  const auto item = [&](size_t column) {
    const py::handle list = group.columns[column];
    return list.is_none() ? py::object(py::none()) : sequence_item(list, index);
  };
  const py::object grad_object = item(kGrad);
  if (grad_object.is_none()) return;
  const Block param = reader_.block(item(kParam), {"", "the parameter", ""}, kFloat32, true);
  const Storage storage = {param.dtype, hyper.state_dtype};
  if (!param.is_dense()) throw LayoutError("the parameter is not one block of memory.");
  if (hyper.state_dtype != HyperParameters::kFull && computed_in(param.dtype) != kFloat32) {
    throw py::value_error("the parameter has dtype " + std::string(dtype_name(param.dtype)) +
                          ", but state_dtype is for moments in the place of float32 ones.");
  }
  const Block grad = reader_.block(grad_object, {"", "its gradient", ""}, param.dtype, false);
  const bool narrower = is_coded(grad.dtype) && param.dtype == computed_in(grad.dtype);
  if (grad.dtype != param.dtype && grad.dtype != computed_in(param.dtype) &&
      !(narrower && allow_mixed)) {
    throw py::type_error("its gradient has dtype " + std::string(dtype_name(grad.dtype)) +
                         ", but the parameter has " + dtype_name(param.dtype) + ".");
  }
  const auto require_like_param = [&](const Block& block, const char* name) {
    if (!same_shape(block, param)) {
      throw py::value_error(std::string("its ") + name + " has shape " + shape_text(block) +
                            ", but the parameter has " + shape_text(param) + ".");
    }
    if (!block.lies_as(param)) {
      throw LayoutError(std::string("its ") + name + " does not lie in memory as it does.");
    }
  };
  require_like_param(grad, "gradient");
  const auto owner = static_cast<int64_t>(streams_.size()) * kStreams;
  Streams streams = {};
  streams.at[kGrad] = grad.data;
  const auto writes = [&](Stream stream, const Block& block) {
    streams.at[stream] = block.data;
    written_.push_back({block.data, block.bytes(), owner + stream});
    memories_.push_back(block.memory());
  };
  writes(kParam, param);
  for (const StreamInfo& info : kStreamTable) {
    if (!is_ours(info) || (streams_for(param.dtype, wanted) >> info.stream & 1u) == 0) continue;
    const py::object object = item(info.stream);
    if (object.is_none()) throw py::value_error(std::string("its ") + info.name + " is missing.");
    const DType stored = dtype_of(info.stream, storage);
    const Block block = reader_.block(object, {"its ", info.name, ""}, stored, true);
    if (block.dtype != stored) {
      throw py::type_error(std::string("its ") + info.name + " has dtype " +
                           dtype_name(block.dtype) + ", expected " + own_dtype_name(stored) + ".");
    }
    const int64_t entries = entries_of(info.stream, param.size);
    if (is_like_param(info.stream, storage)) {
      require_like_param(block, info.name);
    } else if (block.nd != 1 || block.size != entries || !block.is_dense()) {
      throw py::value_error(std::string("its ") + info.name + " must have shape (" +
                            std::to_string(entries) + ",).");
    }
    writes(info.stream, block);
  }
  const StepCount count = reader_.step_count(item(kStreams), {"", "its step count", ""});
  const int64_t step = count.value() + 1;
  counts_.emplace_back(count, step);
  if (step != planned_step) {
    planned_step = step;
    plan_.set_rule(hyper, step);
  }
  grads_.push_back(grad.memory());
  streams_.push_back(streams);  // there is room: see step()
  plan_.add_array(streams_.back(), param.size, storage, grad.dtype, 0,
                  group.first + static_cast<uint32_t>(index));
}

void BatchStep::plan_group(size_t index, const Group& group, bool allow_mixed) {
  const py::tuple& columns = group.columns;
  if (columns.size() != kStreams + 1) throw std::logic_error("columns of another table");
  Rates numbers = Rates::refused();
  const std::string where = "param_groups[" + std::to_string(index) + "]";
  const HyperParameters hyper = options_.read(group.options, where, numbers);
  const unsigned wanted = wanted_streams(hyper);
  const size_t count = sequence_size(columns[kParam]);
  for (const py::handle& column : columns) {
    if (!column.is_none() && sequence_size(column) != count) {
      throw py::value_error(where + ": lists of different lengths.");
    }
  }
  int64_t planned_step = -1;
  for (size_t i = 0; i < count; ++i) {
    places_.resize(streams_.size());
    places_.emplace_back(index, i);
    // Rendered only where something is wrong: a text for each took as long as all else.
    const auto here = [&](const std::exception& error) {
      return path_of(index, i) + ": " + error.what();
    };
    try {
      plan_param(i, group, hyper, wanted, allow_mixed, planned_step);
    } catch (const LayoutError& error) {
      throw LayoutError(here(error));
    } catch (const py::value_error& error) {
      throw py::value_error(here(error));
    } catch (const py::type_error& error) {
      throw py::type_error(here(error));
    }
  }
  places_.resize(streams_.size());
}

void BatchStep::check_overlaps() {
  if (written_ != known_) {
    known_.clear();
    memory_.clear();
    for (size_t i = 0; i < written_.size(); ++i) memory_.add(memories_[i], written_[i].owner);
    const auto [a, b] = memory_.index();
    if (a != WrittenMemory::kNone) {
      throw py::value_error(name_of(b) + " shares memory with " + name_of(a) +
                            ". Every array that is updated needs memory of its own.");
    }
    known_ = written_;
  }
  memory_.look_again();
  hints_.resize(grads_.size());
  for (size_t i = 0; i < grads_.size(); ++i) {
    const int64_t owner = memory_.owner_of_overlap(grads_[i], hints_[i]);
    if (owner == WrittenMemory::kNone) continue;
    const auto [group, index] = places_[i];
    throw py::value_error("the gradient of " + path_of(group, index) + " shares memory with " +
                          name_of(owner) + ", which a step writes. Pass a copy.");
  }
}

StepReport BatchStep::step(const py::list& groups, double grad_scale, bool allow_mixed) {
  const Scope scope(*this);
  StepWishes wishes;
  wishes.grad_scale = grad_scale;
  size_t params = 0;
  std::vector<Group> all;
  for (const py::handle& entry : groups) {
    const auto group = entry.cast<py::tuple>();
    all.push_back(
        {group[0].cast<py::dict>(), group[1].cast<py::tuple>(), group[2].cast<uint32_t>()});
    params += sequence_size(all.back().columns[kParam]);
    Rates numbers = Rates::refused();
    const std::string where = "param_groups[" + std::to_string(all.size() - 1) + "]";
    wishes.add(options_.read(all.back().options, where, numbers));
  }
  streams_.reserve(params);  // plans point at them
  plan_.begin(wishes);
  for (size_t g = 0; g < all.size(); ++g) plan_group(g, all[g], allow_mixed);
  plan_.end();
  check_overlaps();
  const WithoutGil no_gil;
  const StepReport report = plan_.measure(*isa_.stages, threads_);
  plan_.run(*isa_.stages, threads_, report);
  if (!report.skipped) {
    for (const auto& [count, step] : counts_) count.set(step);
  }
  return report;
}

}  // namespace fused_adam
