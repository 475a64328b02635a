// A method that Python calls without pybind11's dispatcher, whose work for each call is a good part
// of a step of few elements.
#pragma once

#include <pybind11/pybind11.h>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

namespace fused_adam {

namespace py = pybind11;

// A new reference to what function() returns; null and a Python exception where it throws, as from
// a function of pybind11. Not noexcept: Python before 3.14 ends a daemon thread that asks for the
// GIL at the end of the program by unwinding its stack (pthread_exit), which has to pass.
template <class Function>
PyObject* translated(Function function) {
  try {
    return py::object(function()).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
#if defined(__GLIBCXX__)
  } catch (abi::__forced_unwind&) {
    throw;
#endif
  } catch (...) {
    py::detail::try_translate_exceptions();
  }
  return nullptr;
}

// Adds the method name(self, args...) to a class. count: of the arguments after self.
template <class Self, int count, py::object (*function)(Self&, PyObject* const*)>
void add_fast_method(py::class_<Self>& type, const char* name) {
  static const auto call = [](PyObject* self, PyObject* const* args,
                              Py_ssize_t given) -> PyObject* {
    if (given != count) {
      return PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", count, given);
    }
    return translated([&] { return function(*py::handle(self).cast<Self*>(), args); });
  };
  static PyMethodDef definition = {
      name,
      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
          static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>(call))),
      METH_FASTCALL, nullptr};
  auto* const cls = reinterpret_cast<PyTypeObject*>(type.ptr());
  type.attr(name) = py::reinterpret_steal<py::object>(PyDescr_NewMethod(cls, &definition));
}

}  // namespace fused_adam
