// fused_adam._core: the table of contents of what Python sees. _core.pyi says the same with types.
#include <pybind11/stl.h>

#include <optional>

#include "../cpu_limit.hpp"
#include "../dispatch.hpp"
#include "../parallel.hpp"
#include "batch_step.hpp"
#include "contexts.hpp"
#include "fast_call.hpp"
#include "functional.hpp"
#include "moments.hpp"
#include "optimizer.hpp"
#include "structure.hpp"
#include "text.hpp"

namespace fused_adam {
namespace {

std::vector<std::string> isa_names(bool only_supported) {
  std::vector<std::string> names;
  for (const Isa& isa : compiled_isas()) {
    if (!only_supported || isa.supported) names.push_back(isa.name);
  }
  return names;
}

py::list streams_for_python() {
  py::list rows;
  for (const StreamInfo& info : kStreamTable) {
    py::dict row;
    row["name"] = info.name;
    row["ours"] = is_ours(info);
    row["copy_of_param"] = info.initial == Initial::kCopyOfParam;
    row["coded_only"] = info.coded_only;
    row["elements_per_entry"] = info.elements_per_entry;
    row["format"] = info.format;
    row["option"] = info.option == nullptr ? py::object(py::none()) : py::str(info.option);
    rows.append(row);
  }
  return rows;
}

// The names of the streams of ours that steps with these options need.
std::vector<std::string> streams_of(const py::dict& options) {
  Rates rates = Rates::not_asked();
  const HyperParameters hyper = OptionReader().read(options, "", rates);
  std::vector<std::string> names;
  for (const StreamInfo& info : kStreamTable) {
    if (is_ours(info) && info.wanted(hyper)) names.push_back(info.name);
  }
  return names;
}

// None for a step that measured nothing, as most; else (skipped, grad_norm).
py::object report_for_python(const StepReport& report) {
  if (!report.measured) return py::none();
  return py::make_tuple(report.skipped, report.grad_norm);
}

// Optimizer.step(grads, param_groups, zero_grad, grad_scale, *overrides)
py::object step(Optimizer& optimizer, PyObject* const* args) {
  const OptionOverrides overrides = {args[4], args[5], args[6]};
  return report_for_python(
      optimizer.step(args[0], args[1], args[2] == Py_True, read_grad_scale(args[3]), overrides));
}

void bind(py::module_& m) {
  m.attr("__version__") = FUSED_ADAM_VERSION;
  m.attr("numerics") = kNumerics;
  m.attr("compiler") = FUSED_ADAM_COMPILER;
  m.def("compiled_isas", [] { return isa_names(false); });
  m.def("supported_isas", [] { return isa_names(true); });
  m.def("check_isa", [](const std::string& name) { isa_by_name(name); }, py::arg("name"));
  m.def("openmp_version", &openmp_version);
  m.def("usable_cpus", &usable_cpus);

  py::class_<Threads>(m, "Threads")
      .def(py::init([](const std::string& back_end, int limit) {
             return Threads{back_end_by_name(back_end), limit};
           }),
           py::arg("back_end"), py::arg("limit"))
      .def_property_readonly("back_end",
                             [](const Threads& threads) { return name_of(threads.back_end); })
      .def_property_readonly("most", &most_threads);

  m.def(
      "check_options",
      [](const py::dict& options, const std::string& where, std::optional<int64_t> steps) {
        Rates rates = steps ? Rates::asked_for(*steps) : Rates::not_asked();
        OptionReader().read(options, where, rates);
      },
      py::arg("options"), py::arg("where"), py::arg("steps"));
  m.def("learning_rates", &learning_rates, py::arg("groups"), py::arg("names"), py::arg("steps"));
  m.def("option_table", &options_for_python);
  m.def("stream_table", &streams_for_python);
  m.def("scatter", &scatter, py::arg("elements"), py::arg("arrays"));
  m.def("streams_of", &streams_of, py::arg("options"));
  m.def(
      "adam_step",
      [](const std::string& isa, const Threads& threads, const py::dict& options, int64_t step,
         const py::dict& arrays, bool zero_grad, const py::object& grad_scale, bool allow_mixed) {
        return report_for_python(
            adam_step(isa, threads, options, step, arrays, zero_grad, grad_scale, allow_mixed));
      },
      py::arg("isa"), py::arg("threads"), py::arg("options"), py::arg("step"), py::arg("arrays"),
      py::arg("zero_grad"), py::arg("grad_scale"), py::arg("allow_mixed"));

  m.def("decode_moment", &decode_moment, py::arg("isa"), py::arg("name"), py::arg("codes"),
        py::arg("exponents"));
  m.def("encode_moment", &encode_moment, py::arg("isa"), py::arg("name"), py::arg("state_dtype"),
        py::arg("numbers"), py::arg("step"));

  py::class_<Structure, std::shared_ptr<Structure>>(m, "Structure")
      .def(py::init<const py::object&>(), py::arg("params"))
      .def("__len__", &Structure::size)
      .def("unflatten",
           py::overload_cast<const std::vector<py::object>&>(&Structure::unflatten, py::const_),
           py::arg("leaves"))
      .def_property_readonly("names",
                             [](const Structure& structure) {
                               py::list names;
                               for (const std::string& name : structure.names()) {
                                 names.append(decoded(name));
                               }
                               return names;
                             })
      .def_property_readonly("leaves", &Structure::leaves);

  py::class_<Optimizer> optimizer(m, "Optimizer");
  add_fast_method<Optimizer, 4 + kOverrides, step>(optimizer, "step");
  optimizer
      .def(py::init<const std::string&, const Threads&, bool>(), py::arg("isa"), py::arg("threads"),
           py::arg("allow_mixed"))
      .def("__len__", &Optimizer::size)
      .def_property_readonly("isa", &Optimizer::isa)
      .def_property_readonly("grouped", &Optimizer::grouped)
      .def_property_readonly("trees", &Optimizer::trees)
      .def_property_readonly("groups", &Optimizer::groups)
      .def_property_readonly("names", &Optimizer::names)
      .def_property_readonly("sizes", &Optimizer::sizes)
      .def_property_readonly("state_dtypes", &Optimizer::state_dtypes)
      .def_property_readonly("steps", &Optimizer::steps)
      .def_property("skipped_steps", &Optimizer::skipped_steps, &Optimizer::set_skipped_steps)
      .def("add_tree", &Optimizer::add_tree, py::arg("param_groups"), py::arg("structure"),
           py::arg("new_groups"), py::arg("grouped"), py::arg("frozen"))
      .def("check_groups", &Optimizer::check_groups, py::arg("param_groups"))
      .def("zero", &Optimizer::zero, py::arg("grads"))
      .def("accumulate", &Optimizer::accumulate, py::arg("sums"), py::arg("grads"))
      .def("state", &Optimizer::state, py::arg("index"))
      .def("all_state", &Optimizer::all_state)
      .def("kinds", &Optimizer::kinds)
      .def("streams", &Optimizer::streams, py::arg("wanted"))
      .def("store_state_as", &Optimizer::store_state_as, py::arg("options"))
      .def("make_wanted_streams", &Optimizer::make_wanted_streams, py::arg("param_groups"))
      .def("set_state", &Optimizer::set_state, py::arg("step_counts"), py::arg("streams"),
           py::arg("new_options"), py::arg("steps"))
      .def("params", &Optimizer::params)
      .def("members", &Optimizer::members)
      .def("new_grads", &Optimizer::new_grads, py::arg("first_tree"))
      .def("averages", &Optimizer::averages, py::arg("param_groups"));

  py::register_exception<LayoutError>(m, "LayoutError", PyExc_ValueError);
  py::class_<BatchStep>(m, "BatchStep")
      .def(py::init<const std::string&, const Threads&, const py::object&>(), py::arg("isa"),
           py::arg("threads"), py::arg("tensor_type"))
      .def(
          "step",
          [](BatchStep& batch, const py::list& groups, double grad_scale, bool allow_mixed) {
            return report_for_python(batch.step(groups, grad_scale, allow_mixed));
          },
          py::arg("groups"), py::arg("grad_scale"), py::arg("allow_mixed"));

  py::class_<ExclusiveUse>(m, "ExclusiveUse")
      .def(py::init<py::object>(), py::arg("optimizer"))
      .def("__enter__", &ExclusiveUse::enter)
      .def("__exit__", [](ExclusiveUse& self, const py::args&) { self.exit(); });

  py::class_<EmaWeights>(m, "EmaWeights")
      .def(py::init<py::object, py::object>(), py::arg("optimizer"), py::arg("param_groups"))
      .def("__enter__", &EmaWeights::enter)
      .def("__exit__", [](EmaWeights& self, const py::args&) { self.exit(); });
}

}  // namespace
}  // namespace fused_adam

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  fused_adam::watch_forks();
  fused_adam::load_array_types();
  fused_adam::usable_cpus();  // reads the cgroup's files now, not in a step
  fused_adam::bind(m);
}
