// The floating-point mode that every promise of equal bits needs, for as long as an object lives.
#pragma once

#include <stdint.h>

#if defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(_M_ARM64)
#include <intrin.h>
#endif

namespace fused_adam {

// Round to nearest, keep subnormals, trap nothing; the mode of the thread is put back afterwards
// (9 ns). Without it a caller's flush-to-zero would change the bits of his own slices only, since
// worker threads have a mode of their own.
class DefaultFloatMode {
 public:
  DefaultFloatMode() noexcept : saved_(get()) { set(kDefault); }
  ~DefaultFloatMode() { set(saved_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
#if defined(__SSE2__) || defined(_M_X64)
  using Register = unsigned;
  static constexpr Register kDefault = 0x1F80;
  static Register get() noexcept { return _mm_getcsr(); }
  static void set(Register mode) noexcept { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kDefault = 0;
  static Register get() noexcept {
    Register mode;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Register mode) noexcept {
    __asm__ __volatile__("msr fpcr, %0" : : "r"(mode) : "memory");
  }
#elif defined(_M_ARM64)
  using Register = int64_t;
  static constexpr Register kDefault = 0;
  static Register get() noexcept { return _ReadStatusReg(ARM64_FPCR); }
  static void set(Register mode) noexcept { _WriteStatusReg(ARM64_FPCR, mode); }
#else
  // Elsewhere the mode is the caller's own affair.
  using Register = int;
  static constexpr Register kDefault = 0;
  static Register get() noexcept { return 0; }
  static void set(Register) noexcept {}
#endif

  Register saved_;
};

}  // namespace fused_adam
