#include "functional.hpp"

#include "../dispatch.hpp"
#include "../overlap.hpp"
#include "../step.hpp"
#include "../stream_table.hpp"
#include "arrays.hpp"
#include "containers.hpp"
#include "memory.hpp"
#include "options.hpp"
#include "without_gil.hpp"

namespace fused_adam {
namespace {

// That an array is what such a stream has to be for this param.
void require_stream(const ArrayFacts& array, const Place& name, Stream stream,
                    const ArrayFacts& param, const Storage& storage) {
  const DType stored = dtype_of(stream, storage);
  if (stored != param.dtype && array.dtype != stored) {
    throw py::type_error(name.str() + " has dtype " + dtype_name(array.dtype) + ", expected " +
                         own_dtype_name(stored) + " for a param of " + dtype_name(param.dtype) +
                         (is_coded(stored) ? " with this state_dtype." : "."));
  }
  if (is_like_param(stream, storage)) {
    const Place param_name = {"", "param", ""};
    ArrayFacts like = param;
    like.dtype = stored;
    return require_like(array, name, like, &param_name);
  }
  const int64_t entries = entries_of(stream, param.size);
  if (array.nd != 1 || array.size != entries) {
    throw py::value_error(name.str() + " must have shape (" + std::to_string(entries) +
                          ",): it is stored in blocks, in the order of the elements in memory.");
  }
}

}  // namespace

StepReport adam_step(const std::string& isa, const Threads& threads, const py::dict& options,
                     int64_t step, const py::dict& arrays, bool zero_grad, py::handle grad_scale,
                     bool allow_mixed) {
  Rates numbers = Rates::refused();
  const HyperParameters hyper = OptionReader().read(options, "", numbers);
  const double scale = read_grad_scale(grad_scale);
  const unsigned wanted = wanted_streams(hyper);
  Streams streams = {};
  ArrayFacts param = {};
  DType grad_dtype = kFloat32;
  Memory read = {};
  WrittenMemory written;
  for (const StreamInfo& info : kStreamTable) {
    const py::object array = dict_item(arrays, py::str(info.name));
    if (info.option != nullptr && array.is_none()) {
      if ((streams_for(param.dtype, wanted) >> info.stream & 1u) == 0) continue;
      throw py::value_error(std::string(info.option) + " needs " + info.name + ".");
    }
    const Place name = {"", info.name, ""}, param_name = {"", "param", ""};
    const Storage storage = {param.dtype, hyper.state_dtype};
    const DType stored = dtype_of(info.stream, storage);
    const bool callers = !is_ours(info);
    const ArrayFacts facts = callers ? array_facts(array, name) : array_facts(array, name, stored);
    if (info.stream == kParam) {
      param = facts;
      if (hyper.state_dtype != HyperParameters::kFull && computed_in(param.dtype) != kFloat32) {
        throw py::value_error(
            "state_dtype is for moments in the place of float32 ones, but param "
            "has dtype " +
            std::string(dtype_name(param.dtype)) + ".");
      }
    } else if (info.stream == kGrad) {
      require_grad(facts, name, param, param_name, allow_mixed);
      grad_dtype = facts.dtype;
    } else {
      require_stream(facts, name, info.stream, param, storage);
    }
    if (info.access == Access::kUpdated) {
      require_writeable(array, name, "a step updates it in place.");
      written.add(facts.memory(), info.stream);
    } else {
      read = facts.memory();
      if (zero_grad) require_writeable(array, name, "zero_grad=True sets it to zeros.");
    }
    streams.at[info.stream] = facts.data;
  }
  const auto [a, b] = written.index();
  if (a != WrittenMemory::kNone) {
    throw py::value_error(std::string(kStreamTable[b].name) + " shares memory with " +
                          kStreamTable[a].name + ". Every array that is updated needs its own.");
  }
  size_t hint = 0;
  const int64_t owner = written.owner_of_overlap(read, hint);
  if (owner != WrittenMemory::kNone) {
    throw py::value_error(std::string("grad shares memory with ") + kStreamTable[owner].name +
                          ", which a step writes. Pass a copy.");
  }

  StepPlan plan;
  StepWishes wishes;
  wishes.zero_grad = zero_grad;
  wishes.grad_scale = scale;
  wishes.add(hyper);
  plan.begin(wishes);
  plan.set_rule(hyper, step);
  plan.add_array(streams, param.size, {param.dtype, hyper.state_dtype}, grad_dtype);
  plan.end();
  const StageTable& stages = *isa_by_name(isa).stages;
  const WithoutGil no_gil;
  const StepReport report = plan.measure(stages, threads);
  plan.run(stages, threads, report);
  return report;
}

}  // namespace fused_adam
