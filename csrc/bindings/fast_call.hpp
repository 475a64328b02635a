// A method that Python calls without pybind11's dispatcher, whose work for each call is a good part
// of a step of few elements.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

namespace fused_adam {

namespace py = pybind11;

// A new reference to what function() returns; null and a Python exception where it throws, of the
// class that pybind11 makes of it.
template <class Function>
PyObject* translated(Function function) noexcept {
  try {
    return py::object(function()).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::out_of_range& error) {
    PyErr_SetString(PyExc_IndexError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Adds method(self, args...) to a class. It has to be static; count: of its arguments.
template <class Self, int count, py::object (*function)(Self&, PyObject* const*)>
void add_fast_method(py::class_<Self>& type, const char* name) {
  static const auto call = [](PyObject* self, PyObject* const* args,
                              Py_ssize_t given) noexcept -> PyObject* {
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
