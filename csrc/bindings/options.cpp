#include "options.hpp"

#include <cmath>
#include <cstring>

#include "containers.hpp"
#include "text.hpp"

namespace fused_adam {
namespace {

std::string place(const std::string& where, py::handle key) {
  if (where.empty()) return text(key);
  return where + "[" + repr_text(key) + "]";
}

[[noreturn]] void refuse(const std::string& where, const char* expected, py::handle found) {
  throw py::value_error(where + " must be " + expected + ", got " + repr_text(found) + ".");
}

[[noreturn]] void refuse_type(const std::string& where, const char* expected, py::handle found) {
  throw py::type_error(where + " must be " + expected + ", got " + repr_text(found) + " of type " +
                       std::string(Py_TYPE(found.ptr())->tp_name) + ".");
}

py::object required(const py::dict& group, py::handle key, const std::string& where) {
  py::object value = dict_item(group, key);
  if (!value) throw py::value_error(place(where, key) + " is missing.");
  return value;
}

// NumPy would make a float of a text, of raw bytes, or of a complex number without its second part.
bool is_real(py::handle value) {
  if (PyBool_Check(value.ptr())) return false;
  const py::object kind = py::getattr(py::getattr(value, "dtype", py::none()), "kind", py::none());
  if (kind.is_none()) return true;
  const char* text = PyUnicode_Check(kind.ptr()) ? PyUnicode_AsUTF8(kind.ptr()) : nullptr;
  PyErr_Clear();
  return text != nullptr && (text[0] == 'f' || text[0] == 'i' || text[0] == 'u') && text[1] == 0;
}

// Any real number: float, int, NumPy scalars and 0-d arrays, Decimal. A bool is a slip, a str is no
// number. place() is what a message calls it.
template <class Place>
double number(py::handle value, const Place& place) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (!is_real(value)) refuse_type(place(), "a number", value);
  const double x = PyFloat_AsDouble(value.ptr());
  if (x == -1.0 && PyErr_Occurred()) {
    const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError);
    const bool is_no_number =
        PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_ValueError);
    if (!too_large && !is_no_number) throw py::error_already_set();
    PyErr_Clear();
    if (too_large) throw py::value_error(place() + " is too large for a float.");
    refuse_type(place(), "a number", value);
  }
  return x;
}

bool flag(py::handle value, const std::string& where, py::handle key) {
  if (value.ptr() == Py_True) return true;
  if (value.ptr() == Py_False) return false;
  refuse_type(place(where, key), "True or False", value);
}

double finite_not_negative(py::handle value, const std::string& where, py::handle key) {
  const auto here = [&] { return place(where, key); };
  const double x = number(value, here);
  if (!(x >= 0.0) || std::isinf(x)) refuse(here(), "finite and >= 0", value);
  return x;
}

double beta(py::handle betas, py::ssize_t i, const std::string& where, py::handle key) {
  const py::object value = py::reinterpret_steal<py::object>(PySequence_GetItem(betas.ptr(), i));
  if (!value) throw py::error_already_set();
  const auto here = [&] { return place(where, key) + "[" + std::to_string(i) + "]"; };
  const double x = number(value, here);
  if (!(x >= 0.0 && x < 1.0)) refuse(here(), ">= 0 and < 1", value);
  return x;
}

py::str interned(const char* name) {
  return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
}

}  // namespace

OptionReader::OptionReader()
    : lr_(interned("lr")),
      betas_(interned("betas")),
      eps_(interned("eps")),
      weight_decay_(interned("weight_decay")),
      amsgrad_(interned("amsgrad")),
      maximize_(interned("maximize")),
      decoupled_weight_decay_(interned("decoupled_weight_decay")) {}

HyperParameters OptionReader::read(const py::dict& group, const std::string& where) const {
  const auto get = [&](py::handle key) { return required(group, key, where); };
  HyperParameters hyper;
  hyper.lr = finite_not_negative(get(lr_), where, lr_);
  const py::object betas = get(betas_);
  const bool is_pair = (PyTuple_Check(betas.ptr()) || PyList_Check(betas.ptr()));
  if (!is_pair) refuse_type(place(where, betas_), "a pair of numbers", betas);
  if (Py_SIZE(betas.ptr()) != 2) refuse(place(where, betas_), "a pair of numbers", betas);
  hyper.beta1 = beta(betas, 0, where, betas_);
  hyper.beta2 = beta(betas, 1, where, betas_);
  hyper.eps = finite_not_negative(get(eps_), where, eps_);
  hyper.weight_decay = finite_not_negative(get(weight_decay_), where, weight_decay_);
  hyper.amsgrad = flag(get(amsgrad_), where, amsgrad_);
  hyper.maximize = flag(get(maximize_), where, maximize_);
  hyper.decoupled_weight_decay = flag(get(decoupled_weight_decay_), where, decoupled_weight_decay_);
  return hyper;
}

}  // namespace fused_adam
