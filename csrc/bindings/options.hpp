// Hyper-parameters from Python: read, checked, and refused with the place they were found at.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../coefficients.hpp"

namespace fused_adam {

namespace py = pybind11;

// Reads the options of a parameter group, a dict as in torch.optim. TypeError for a wrong Python
// type, ValueError for a value out of range or a missing key. where: "param_groups[0]", or "" for
// keyword arguments, which messages call by their bare name.
class OptionReader {
 public:
  OptionReader();
  HyperParameters read(const py::dict& group, const std::string& where) const;

 private:
  py::str lr_, betas_, eps_, weight_decay_, amsgrad_, maximize_, decoupled_weight_decay_;
};

}  // namespace fused_adam
