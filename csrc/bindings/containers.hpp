// Items of Python containers as strong references, also where other threads may change the
// container.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_adam {

namespace py = pybind11;

// Null where the key is missing.
inline py::object dict_item(py::handle dict, py::handle key) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* value = nullptr;
  if (PyDict_GetItemRef(dict.ptr(), key.ptr(), &value) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
#else
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(value);
#endif
}

// Of a list or tuple. Throws IndexError where another thread has shortened the list.
inline py::object sequence_item(py::handle sequence, size_t i) {
  const auto index = static_cast<py::ssize_t>(i);
  PyObject* item;
  if (PyTuple_Check(sequence.ptr())) {
    item = PyTuple_GetItem(sequence.ptr(), index);
    Py_XINCREF(item);
  } else {
#if PY_VERSION_HEX >= 0x030D0000
    item = PyList_GetItemRef(sequence.ptr(), index);
#else
    item = PyList_GetItem(sequence.ptr(), index);
    Py_XINCREF(item);
#endif
  }
  if (item == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(item);
}

inline size_t sequence_size(py::handle sequence) {
  return static_cast<size_t>(Py_SIZE(sequence.ptr()));
}

}  // namespace fused_adam
