// Python texts as UTF-8. A key may hold half a surrogate pair, for which UTF-8 has no bytes.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fused_adam {

namespace py = pybind11;

inline std::string encoded(py::handle text, const char* errors) {
  const auto bytes =
      py::reinterpret_steal<py::bytes>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", errors));
  if (!bytes) throw py::error_already_set();
  return bytes;
}

// str(object) and repr(object) for messages, with an escape for such a half.
inline std::string text(py::handle object) { return encoded(py::str(object), "backslashreplace"); }
inline std::string repr_text(py::handle object) {
  return encoded(py::repr(object), "backslashreplace");
}

// str(object), from which decoded() makes the same text again, whatever it holds.
inline std::string exact_text(py::handle object) {
  return encoded(py::str(object), "surrogatepass");
}

inline py::str decoded(const std::string& exact) {
  const auto size = static_cast<py::ssize_t>(exact.size());
  PyObject* text = PyUnicode_DecodeUTF8(exact.data(), size, "surrogatepass");
  if (text == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(text);
}

}  // namespace fused_adam
