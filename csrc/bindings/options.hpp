// The options of a parameter group: a table of them, and their values from Python, read, checked,
// and refused with the place they were found at.
#pragma once

#include <pybind11/pybind11.h>

#include <stdint.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "../coefficients.hpp"

namespace fused_adam {

namespace py = pybind11;

// What an option may be.
enum class OptionKind {
  kNotNegative,     // a finite number >= 0
  kRate,            // the same, or a function that gives one for a count of steps
  kBetas,           // a pair of numbers, >= 0 and < 1
  kFlag,            // True or False
  kFractionOrNone,  // a number >= 0 and < 1, or None
  kNotNegativeOrNone,
  kEpsMode,     // a text: "outside", "hat" or "root"
  kStateDType,  // None, or a text: "bfloat16" or "float8"
  kSeed,        // an integer >= 0 and < 2**63
};

// Its default is that of its member in HyperParameters.
struct OptionInfo {
  const char* name;
  OptionKind kind;
  int format;  // of checkpoint files: the first one that knows it
  double HyperParameters::* number;
  bool HyperParameters::* flag;
};

const std::vector<OptionInfo>& option_table();

// The table for Python: a list of {"name": str, "kind": str, "format": int, "default": object}.
py::list options_for_python();

// max_norm, clip_value and skip_nonfinite of one step; None where the groups decide.
constexpr int kOverrides = 3;
using OptionOverrides = std::array<py::handle, kOverrides>;

// By what gradients are to be divided: a number > 0 that is one in float32, too. None: 1.
double read_grad_scale(py::handle value);

// What becomes of functions for learning rates. Each is asked once, so that all groups that share
// one have the same rate.
class Rates {
 public:
  // Ask them for this count of steps. It runs code of the caller.
  static Rates asked_for(int64_t steps) { return Rates(kAsk, steps); }
  // Take them as they are: the rate that is read is the default.
  static Rates not_asked() { return Rates(kLeave, 0); }
  // TypeError: only numbers are taken.
  static Rates refused() { return Rates(kRefuse, 0); }

  bool takes_functions() const { return what_ != kRefuse; }
  // The rate that a function gives, checked. name: what messages call the function.
  double of(py::handle function, const std::string& name);

 private:
  enum What { kAsk, kLeave, kRefuse };
  Rates(What what, int64_t steps) : what_(what), steps_(steps) {}

  What what_;
  int64_t steps_;
  std::vector<std::pair<py::object, double>> asked_;
};

// "bfloat16", "float8"; null for kFull.
const char* state_dtype_name(HyperParameters::StateDType state);

// The rates of groups, which have these names, in the next step after so many. Checked.
std::vector<double> learning_rates(const std::vector<py::dict>& groups,
                                   const std::vector<std::string>& names, int64_t steps);

// Reads the options of a parameter group, a dict as in torch.optim. TypeError for a wrong Python
// type, ValueError for a value out of range or a missing key. where: "param_groups[0]", or "" for
// keyword arguments, which messages call by their bare name.
class OptionReader {
 public:
  OptionReader();
  // Whether the group says so, or nothing.
  bool has_state_dtype(const py::dict& group, const std::string& where,
                       HyperParameters::StateDType state) const;
  HyperParameters read(const py::dict& group, const std::string& where, Rates& rates) const;
  // Those that the arguments of a step give in the place of those of all groups. A clip replaces
  // the group's, of either kind; infinity is none.
  void override_by(const OptionOverrides& overrides, std::vector<HyperParameters>& hypers) const;

 private:
  std::vector<py::str> keys_;  // interned, in the order of the table
  // Compared by what they are, as most groups have these.
  py::str usual_eps_mode_;  // interned
  py::int_ usual_seed_;     // one of the small ones, of which there is one each
};

}  // namespace fused_adam
