// The GIL, released for as long as an object lives.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace fused_adam {

// As py::gil_scoped_release, but for the end of the program: Python before 3.14 ends a daemon
// thread that asks for the GIL then, by unwinding its stack (pthread_exit), and the unwinding ends
// at the first destructor, with std::terminate. Here the thread sleeps until the process is gone,
// as from Python 3.14 on, and holds nothing that others wait for.
class WithoutGil {
 public:
  WithoutGil() noexcept : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // of the unwinding; to be left only by throwing on
      while (true) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fused_adam
