#include "functional.hpp"

#include "../dispatch.hpp"
#include "../overlap.hpp"
#include "../step.hpp"
#include "arrays.hpp"
#include "options.hpp"
#include "without_gil.hpp"

namespace fused_adam {

void adam_step(const std::string& isa, const Threads& threads, const py::dict& options,
               int64_t step, py::handle param, py::handle grad, py::handle exp_avg,
               py::handle exp_avg_sq, py::handle max_exp_avg_sq) {
  const HyperParameters hyper = OptionReader().read(options, "");
  if (hyper.amsgrad && max_exp_avg_sq.is_none()) {
    throw py::value_error("amsgrad needs max_exp_avg_sq.");
  }

  struct Argument {
    const char* name;
    py::handle array;
    bool written;
  };
  const Argument arguments[] = {{"param", param, true},
                                {"grad", grad, false},
                                {"exp_avg", exp_avg, true},
                                {"exp_avg_sq", exp_avg_sq, true},
                                {"max_exp_avg_sq", max_exp_avg_sq, true}};
  const int count = max_exp_avg_sq.is_none() ? 4 : 5;
  constexpr int kGrad = 1;
  Memory grad_memory = {};
  void* data[5] = {};
  ArrayFacts param_facts = {};
  WrittenMemory written;
  for (int i = 0; i < count; ++i) {
    const Argument& argument = arguments[i];
    const Place name = {"", argument.name, ""};
    const ArrayFacts facts = array_facts(argument.array, name);
    if (i == 0) param_facts = facts;
    require_like(facts, name, param_facts, {"", "param", ""});
    if (argument.written) {
      require_writeable(argument.array, name, "a step updates it in place.");
      written.add(facts.memory(), i);
    }
    if (i == kGrad) grad_memory = facts.memory();
    data[i] = facts.data;
  }
  const auto [a, b] = written.index();
  if (a != WrittenMemory::kNone) {
    throw py::value_error(std::string(arguments[b].name) + " shares memory with " +
                          arguments[a].name + ". Every array that is updated needs its own.");
  }
  size_t hint = 0;
  const int64_t owner = written.owner_of_overlap(grad_memory, hint);
  if (owner != WrittenMemory::kNone) {
    throw py::value_error(std::string("grad shares memory with ") + arguments[owner].name +
                          ", which a step writes. Pass a copy.");
  }

  StepPlan plan;
  plan.set_rule(hyper, step);
  plan.add_array({data[0], data[1], data[2], data[3], data[4]}, param_facts.size,
                 param_facts.dtype);
  const KernelTable& kernels = *isa_by_name(isa).kernels;
  const WithoutGil no_gil;
  plan.run(kernels, threads);
}

}  // namespace fused_adam
