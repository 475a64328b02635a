// What `with` enters. Objects that give back in their destructor what nobody gave back before: from
// Python 3.14 on an interruption may come between entering and the protected body.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>
#include <utility>

#include "optimizer.hpp"

namespace fused_adam {

// `with core.exclusive(): ...`, from where it is made.
class ExclusiveUse {
 public:
  explicit ExclusiveUse(py::object optimizer)
      : optimizer_(std::move(optimizer)),
        exclusive_(std::in_place, optimizer_.cast<Optimizer&>().use()) {}
  void enter() const {
    if (!exclusive_) throw std::runtime_error("exclusive use has ended.");
  }
  void exit() { exclusive_.reset(); }

 private:
  py::object optimizer_;
  std::optional<Exclusive> exclusive_;
};

// `with opt.ema_weights(): ...`
class EmaWeights {
 public:
  EmaWeights(py::object optimizer, py::object param_groups)
      : optimizer_(std::move(optimizer)), param_groups_(std::move(param_groups)) {}
  ~EmaWeights() {
    if (state_ != kEntered) return;
    const py::error_scope interruption;
    try {
      exit();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("EmaWeights");
    } catch (...) {
      py::detail::try_translate_exceptions();
      PyErr_WriteUnraisable(optimizer_.ptr());
    }
  }
  EmaWeights(const EmaWeights&) = delete;
  EmaWeights& operator=(const EmaWeights&) = delete;

  void enter() {
    optimizer_.cast<Optimizer&>().use_averages(param_groups_);
    state_ = kEntered;
  }
  // Where it fails, it can be tried again; the destructor does not.
  void exit() {
    if (state_ == kOutside) throw std::runtime_error(kNoAverages);
    state_ = kFailed;
    optimizer_.cast<Optimizer&>().use_params();
    state_ = kOutside;
  }

 private:
  py::object optimizer_, param_groups_;
  enum { kOutside, kEntered, kFailed } state_ = kOutside;
};

}  // namespace fused_adam
