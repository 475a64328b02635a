// fused_adam._core: the table of contents of what Python sees. _core.pyi says the same with types.
#include <pybind11/stl.h>

#include "../cpu_limit.hpp"
#include "../dispatch.hpp"
#include "../parallel.hpp"
#include "functional.hpp"
#include "memory.hpp"
#include "optimizer.hpp"
#include "structure.hpp"

namespace fused_adam {
namespace {

std::vector<std::string> isa_names(bool only_supported) {
  std::vector<std::string> names;
  for (const Isa& isa : compiled_isas()) {
    if (!only_supported || isa.supported) names.push_back(isa.name);
  }
  return names;
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
      [](const py::dict& options, const std::string& where) {
        OptionReader().read(options, where);
      },
      py::arg("options"), py::arg("where"));
  m.def("zeroed", &zeroed, py::arg("bytes"));
  m.def("adam_step", &adam_step, py::arg("isa"), py::arg("threads"), py::arg("options"),
        py::arg("step"), py::arg("param"), py::arg("grad"), py::arg("exp_avg"),
        py::arg("exp_avg_sq"), py::arg("max_exp_avg_sq"));

  py::class_<Structure, std::shared_ptr<Structure>>(m, "Structure")
      .def(py::init<const py::object&>(), py::arg("params"))
      .def("__len__", &Structure::size)
      .def("unflatten",
           py::overload_cast<const std::vector<py::object>&>(&Structure::unflatten, py::const_),
           py::arg("leaves"))
      .def_property_readonly("names", &Structure::names)
      .def_property_readonly("named", &Structure::named);

  py::class_<Optimizer>(m, "Optimizer")
      .def(py::init<const std::string&, const Threads&, py::object>(), py::arg("isa"),
           py::arg("threads"), py::arg("allocate"))
      .def("__len__", &Optimizer::size)
      .def_property_readonly("isa", &Optimizer::isa)
      .def_property_readonly("grouped", &Optimizer::grouped)
      .def_property_readonly("structures", &Optimizer::structures)
      .def("add_group", &Optimizer::add_group, py::arg("param_groups"), py::arg("group"),
           py::arg("structure"), py::arg("grouped"), py::arg("frozen"))
      .def("check_groups", &Optimizer::check_groups, py::arg("param_groups"))
      .def("step", &Optimizer::step, py::arg("grads"), py::arg("param_groups"))
      .def("zero", &Optimizer::zero, py::arg("grads"))
      .def("state", &Optimizer::state, py::arg("index"))
      .def("set_step", &Optimizer::set_step, py::arg("index"), py::arg("step"))
      .def("make_max_exp_avg_sq", &Optimizer::make_max_exp_avg_sq, py::arg("indices"))
      .def("__enter__", &Optimizer::enter)
      .def("__exit__", [](Optimizer& self, const py::args&) { self.exit(); });
}

}  // namespace
}  // namespace fused_adam

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  fused_adam::watch_forks();
  fused_adam::load_array_types();
  fused_adam::usable_cpus();  // reads the cgroup's files now, not in a step
  fused_adam::bind(m);
}
