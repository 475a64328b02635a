#include "options.hpp"

#include <cmath>
#include <iterator>
#include <limits>
#include <tuple>
#include <utility>

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

template <class Place>
double not_negative(py::handle value, const Place& here) {
  const double x = number(value, here);
  if (!(x >= 0.0) || std::isinf(x)) refuse(here(), "finite and >= 0", value);
  return x;
}

double not_negative(py::handle value, const std::string& where, py::handle key) {
  return not_negative(value, [&] { return place(where, key); });
}

// Most are plain floats. A class is a slip: its instance was meant, or its value.
bool is_function(py::handle lr) {
  return !PyFloat_CheckExact(lr.ptr()) && PyCallable_Check(lr.ptr()) != 0 &&
         !PyType_Check(lr.ptr());
}

double rate(py::handle value, const std::string& where, py::handle key, Rates& rates) {
  if (!is_function(value) || !rates.takes_functions()) return not_negative(value, where, key);
  return rates.of(value, place(where, key));
}

template <class Place>
double fraction(py::handle value, const Place& here) {
  const double x = number(value, here);
  if (!(x >= 0.0 && x < 1.0)) refuse(here(), ">= 0 and < 1", value);
  return x;
}

double fraction_or_none(py::handle value, const std::string& where, py::handle key) {
  if (value.is_none()) return HyperParameters::kNone;
  return fraction(value, [&] { return place(where, key); });
}

double not_negative_or_none(py::handle value, const std::string& where, py::handle key) {
  return value.is_none() ? HyperParameters::kNone : not_negative(value, where, key);
}

std::pair<double, double> two_betas(py::handle betas, const std::string& where, py::handle key) {
  const bool is_pair = PyTuple_Check(betas.ptr()) || PyList_Check(betas.ptr());
  if (!is_pair) refuse_type(place(where, key), "a pair of numbers", betas);
  if (Py_SIZE(betas.ptr()) != 2) refuse(place(where, key), "a pair of numbers", betas);
  const auto beta = [&](py::ssize_t i) {
    const py::object value = py::reinterpret_steal<py::object>(PySequence_GetItem(betas.ptr(), i));
    if (!value) throw py::error_already_set();
    return fraction(value, [&] { return place(where, key) + "[" + std::to_string(i) + "]"; });
  };
  const double beta1 = beta(0);
  return {beta1, beta(1)};
}

py::str interned(const char* name) {
  return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
}

constexpr const char* kEpsModes[] = {"outside", "hat", "root"};  // in the order of EpsMode

HyperParameters::EpsMode eps_mode(py::handle value, const std::string& where, py::handle key) {
  constexpr const char* kExpected = "'outside', 'hat' or 'root'";
  if (!PyUnicode_Check(value.ptr())) refuse_type(place(where, key), kExpected, value);
  for (size_t i = 0; i < std::size(kEpsModes); ++i) {
    if (PyUnicode_CompareWithASCIIString(value.ptr(), kEpsModes[i]) == 0) {
      return static_cast<HyperParameters::EpsMode>(i);
    }
  }
  refuse(place(where, key), kExpected, value);
}

constexpr const char* kStateDTypeNames[] = {nullptr, "bfloat16", "float8"};  // of StateDType

HyperParameters::StateDType state_dtype(py::handle value, const std::string& where,
                                        py::handle key) {
  constexpr const char* kExpected = "None, 'bfloat16' or 'float8'";
  if (value.is_none()) return HyperParameters::kFull;
  if (!PyUnicode_Check(value.ptr())) refuse_type(place(where, key), kExpected, value);
  for (size_t i = 1; i < std::size(kStateDTypeNames); ++i) {
    if (PyUnicode_CompareWithASCIIString(value.ptr(), kStateDTypeNames[i]) == 0) {
      return static_cast<HyperParameters::StateDType>(i);
    }
  }
  refuse(place(where, key), kExpected, value);
}

int64_t seed(py::handle value, const std::string& where, py::handle key) {
  constexpr const char* kExpected = "an integer >= 0 and < 2**63";
  const bool is_integer = PyIndex_Check(value.ptr()) != 0 && !PyBool_Check(value.ptr());
  const auto index =
      py::reinterpret_steal<py::object>(is_integer ? PyNumber_Index(value.ptr()) : nullptr);
  if (!index) {
    if (is_integer && !PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    refuse_type(place(where, key), kExpected, value);
  }
  int overflow = 0;
  const int64_t found = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || found < 0) refuse(place(where, key), kExpected, value);
  return found;
}

const char* name_of(OptionKind kind) {
  switch (kind) {
    case OptionKind::kNotNegative:
      return "number";
    case OptionKind::kRate:
      return "number or function";
    case OptionKind::kBetas:
      return "betas";
    case OptionKind::kFlag:
      return "flag";
    case OptionKind::kFractionOrNone:
      return "fraction or None";
    case OptionKind::kNotNegativeOrNone:
      return "number or None";
    case OptionKind::kEpsMode:
      return "eps mode";
    case OptionKind::kStateDType:
      return "state dtype";
    case OptionKind::kSeed:
      return "seed";
  }
  return "";
}

py::object default_of(const OptionInfo& option) {
  const HyperParameters defaults;
  switch (option.kind) {
    case OptionKind::kNotNegative:
    case OptionKind::kRate:
      return py::float_(defaults.*option.number);
    case OptionKind::kBetas:
      return py::make_tuple(defaults.beta1, defaults.beta2);
    case OptionKind::kFlag:
      return py::bool_(defaults.*option.flag);
    case OptionKind::kEpsMode:
      return interned(kEpsModes[defaults.eps_mode]);
    case OptionKind::kSeed:
      return py::int_(defaults.seed);
    case OptionKind::kFractionOrNone:
    case OptionKind::kNotNegativeOrNone:
    case OptionKind::kStateDType:
      break;
  }
  return py::none();
}

// Which of the two came first would decide what comes out.
[[noreturn]] void refuse_two_clips(const std::string& where) {
  throw py::value_error((where.empty() ? "" : where + ": ") +
                        "max_norm and clip_value exclude each other: one of them must be None.");
}

[[noreturn]] void refuse_two_roundings(const std::string& where) {
  throw py::value_error((where.empty() ? "" : where + ": ") +
                        "master_weights and stochastic_rounding exclude each other: a param of 16 "
                        "bits is the nearest number to its master.");
}

// After 20,000 steps it was 1.49 times what it is in float32, and still rose.
[[noreturn]] void refuse_largest_of_8_bits(const std::string& where) {
  throw py::value_error((where.empty() ? "" : where + ": ") +
                        "amsgrad and state_dtype='float8' exclude each other: second moments in 8 "
                        "bits scatter by a fifth, and the largest of them so far would rise for "
                        "ever. Use state_dtype='bfloat16'.");
}

}  // namespace

const std::vector<OptionInfo>& option_table() {
  using Kind = OptionKind;
  using H = HyperParameters;
  static const std::vector<OptionInfo> table = {
      {"lr", Kind::kRate, 1, &H::lr, nullptr},
      {"betas", Kind::kBetas, 1, nullptr, nullptr},
      {"eps", Kind::kNotNegative, 1, &H::eps, nullptr},
      {"weight_decay", Kind::kNotNegative, 1, &H::weight_decay, nullptr},
      {"amsgrad", Kind::kFlag, 1, nullptr, &H::amsgrad},
      {"maximize", Kind::kFlag, 1, nullptr, &H::maximize},
      {"decoupled_weight_decay", Kind::kFlag, 1, nullptr, &H::decoupled_weight_decay},
      {"ema_decay", Kind::kFractionOrNone, 2, &H::ema_decay, nullptr},
      {"max_norm", Kind::kNotNegativeOrNone, 2, &H::max_norm, nullptr},
      {"clip_value", Kind::kNotNegativeOrNone, 2, &H::clip_value, nullptr},
      {"skip_nonfinite", Kind::kFlag, 2, nullptr, &H::skip_nonfinite},
      {"eps_mode", Kind::kEpsMode, 2, nullptr, nullptr},
      {"bias_correction", Kind::kFlag, 2, nullptr, &H::bias_correction},
      {"master_weights", Kind::kFlag, 2, nullptr, &H::master_weights},
      {"stochastic_rounding", Kind::kFlag, 2, nullptr, &H::stochastic_rounding},
      {"seed", Kind::kSeed, 2, nullptr, nullptr},
      {"state_dtype", Kind::kStateDType, 2, nullptr, nullptr},
  };
  return table;
}

py::list options_for_python() {
  py::list rows;
  for (const OptionInfo& option : option_table()) {
    py::dict row;
    row["name"] = interned(option.name);  // as keys of groups, which each step looks up
    row["kind"] = name_of(option.kind);
    row["format"] = option.format;
    row["default"] = default_of(option);
    rows.append(row);
  }
  return rows;
}

OptionReader::OptionReader()
    : usual_eps_mode_(interned(kEpsModes[HyperParameters().eps_mode])),
      usual_seed_(HyperParameters().seed) {
  for (const OptionInfo& option : option_table()) keys_.push_back(interned(option.name));
}

const char* state_dtype_name(HyperParameters::StateDType state) { return kStateDTypeNames[state]; }

bool OptionReader::has_state_dtype(const py::dict& group, const std::string& where,
                                   HyperParameters::StateDType state) const {
  const py::str key("state_dtype");
  const py::object value = dict_item(group, key);
  return !value || state_dtype(value, where, key) == state;
}

HyperParameters OptionReader::read(const py::dict& group, const std::string& where,
                                   Rates& rates) const {
  const std::vector<OptionInfo>& table = option_table();
  HyperParameters hyper;
  // Here, and not a function: called for each option of each step.
  const auto set = [&](size_t i, py::handle value) {
    const OptionInfo& option = table[i];
    const py::str& key = keys_[i];
    switch (option.kind) {
      case OptionKind::kNotNegative:
        hyper.*option.number = not_negative(value, where, key);
        break;
      case OptionKind::kRate:
        hyper.*option.number = rate(value, where, key, rates);
        break;
      case OptionKind::kBetas:
        std::tie(hyper.beta1, hyper.beta2) = two_betas(value, where, key);
        break;
      case OptionKind::kFlag:
        hyper.*option.flag = flag(value, where, key);
        break;
      case OptionKind::kFractionOrNone:
        hyper.*option.number = fraction_or_none(value, where, key);
        break;
      case OptionKind::kNotNegativeOrNone:
        hyper.*option.number = not_negative_or_none(value, where, key);
        break;
      case OptionKind::kEpsMode:
        if (!value.is(usual_eps_mode_)) hyper.eps_mode = eps_mode(value, where, key);
        break;
      case OptionKind::kStateDType:
        if (!value.is_none()) hyper.state_dtype = state_dtype(value, where, key);
        break;
      case OptionKind::kSeed:
        if (!value.is(usual_seed_)) hyper.seed = seed(value, where, key);
        break;
    }
  };
  size_t i = 0;
#if !defined(Py_GIL_DISABLED)
  // Most groups have their options in the order of the table, where no key needs to be looked up.
  py::ssize_t position = 0;
  PyObject *key, *value;
  while (i < keys_.size() && PyDict_Next(group.ptr(), &position, &key, &value) != 0 &&
         key == keys_[i].ptr()) {
    const auto held = py::reinterpret_borrow<py::object>(value);
    set(i++, held);
  }
#endif
  for (; i < keys_.size(); ++i) {
    const py::object found = dict_item(group, keys_[i]);
    if (!found) throw py::value_error(place(where, keys_[i]) + " is missing.");
    set(i, found);
  }
  if (hyper.clips_norm() && hyper.clips_value()) refuse_two_clips(where);
  if (hyper.master_weights && hyper.stochastic_rounding) refuse_two_roundings(where);
  if (hyper.amsgrad && hyper.state_dtype == HyperParameters::kStateFloat8) {
    refuse_largest_of_8_bits(where);
  }
  return hyper;
}

double Rates::of(py::handle function, const std::string& name) {
  if (what_ == kLeave) return HyperParameters().lr;
  for (const auto& [asked, rate] : asked_) {
    if (asked.is(function)) return rate;
  }
  const py::object now = function(py::int_(steps_));
  const auto call = [&] { return name + "(" + std::to_string(steps_) + ")"; };
  asked_.emplace_back(py::reinterpret_borrow<py::object>(function), not_negative(now, call));
  return asked_.back().second;
}

std::vector<double> learning_rates(const std::vector<py::dict>& groups,
                                   const std::vector<std::string>& names, int64_t steps) {
  Rates rates = Rates::asked_for(steps);
  const OptionReader reader;
  std::vector<double> found;
  for (size_t i = 0; i < groups.size(); ++i) {
    found.push_back(reader.read(groups[i], names.at(i), rates).lr);
  }
  return found;
}

void OptionReader::override_by(const OptionOverrides& overrides,
                               std::vector<HyperParameters>& hypers) const {
  const auto limit = [](py::handle value, const char* name) {
    const auto here = [&] { return std::string(name); };
    const double x = number(value, here);
    if (!(x >= 0.0)) refuse(here(), ">= 0", value);
    return x;
  };
  const auto [max_norm, clip_value, skip_nonfinite] = overrides;
  if (max_norm.is_none() && clip_value.is_none() && skip_nonfinite.is_none()) return;
  if (!max_norm.is_none() && !clip_value.is_none()) refuse_two_clips("");
  constexpr double kNone = HyperParameters::kNone;
  const double norm = max_norm.is_none() ? kNone : limit(max_norm, "max_norm");
  const double value = clip_value.is_none() ? kNone : limit(clip_value, "clip_value");
  const bool skips =
      !skip_nonfinite.is_none() && flag(skip_nonfinite, "", py::str("skip_nonfinite"));
  for (HyperParameters& hyper : hypers) {
    if (!skip_nonfinite.is_none()) hyper.skip_nonfinite = skips;
    if (max_norm.is_none() && clip_value.is_none()) continue;
    hyper.max_norm = norm;
    hyper.clip_value = value;
  }
}

double read_grad_scale(py::handle value) {
  if (value.is_none()) return 1.0;
  const auto here = [] { return std::string("grad_scale"); };
  const double scale = number(value, here);
  constexpr double kLeast = std::numeric_limits<float>::min();
  constexpr double kMost = std::numeric_limits<float>::max();
  if (!(scale >= kLeast && scale <= kMost)) {
    refuse(here(), "> 0 and a number that float32 holds (1.2e-38 to 3.4e38)", value);
  }
  return scale;
}

}  // namespace fused_adam
