#include "dispatch.hpp"

#include <stdint.h>

#include <stdexcept>

#if defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_adam {
namespace {

#if defined(__x86_64__) || defined(_M_X64)

struct Cpuid {
  uint32_t eax, ebx, ecx, edx;
};

Cpuid cpuid(uint32_t leaf) {
  Cpuid r = {};
#if defined(_MSC_VER)
  int regs[4];
  __cpuidex(regs, 0, 0);
  if (static_cast<uint32_t>(regs[0]) < leaf) return r;
  __cpuidex(regs, static_cast<int>(leaf), 0);
  r = {static_cast<uint32_t>(regs[0]), static_cast<uint32_t>(regs[1]),
       static_cast<uint32_t>(regs[2]), static_cast<uint32_t>(regs[3])};
#else
  __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves r alone above the maximum
#endif
  return r;
}

// The register states that the operating system saves on a context switch. A CPU may well have
// instructions whose registers the system does not save.
uint64_t saved_register_states() {
  constexpr uint32_t osxsave = 1u << 27;
  if (!(cpuid(1).ecx & osxsave)) return 0;
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

bool has_all(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

bool has_avx2() {
  constexpr uint32_t fma = 1u << 12, avx = 1u << 28, f16c = 1u << 29;  // leaf 1, ecx
  constexpr uint32_t avx2 = 1u << 5;                                   // leaf 7, ebx
  constexpr uint64_t xmm_ymm = 0x6;
  return has_all(cpuid(1).ecx, fma | avx | f16c) && has_all(cpuid(7).ebx, avx2) &&
         has_all(saved_register_states(), xmm_ymm);
}

[[maybe_unused]] bool has_avx512() {
  constexpr uint32_t f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;  // leaf 7, ebx
  constexpr uint64_t xmm_ymm_opmask_zmm = 0xE6;
  return has_avx2() && has_all(cpuid(7).ebx, f | dq | bw | vl) &&
         has_all(saved_register_states(), xmm_ymm_opmask_zmm);
}

#endif

std::string names(bool only_supported) {
  std::string list;
  for (const Isa& isa : compiled_isas()) {
    if (only_supported && !isa.supported) continue;
    if (!list.empty()) list += ", ";
    list += isa.name;
  }
  return list;
}

}  // namespace

const std::vector<Isa>& compiled_isas() {
  // CMakeLists.txt defines a macro for every kernel file that it compiles. The CPU is asked once:
  // in a virtual machine every CPUID instruction goes to the host and takes up to 30 us.
  static const std::vector<Isa> isas = {
#if defined(FUSED_ADAM_HAS_AVX512)
      {"avx512", has_avx512(), &stages_avx512},
#endif
#if defined(FUSED_ADAM_HAS_AVX2)
      {"avx2", has_avx2(), &stages_avx2},
#endif
#if defined(FUSED_ADAM_HAS_NEON)
      {"neon", true, &stages_neon},
#endif
      {"scalar", true, &stages_scalar},
  };
  return isas;
}

const Isa& isa_by_name(const std::string& name) {
  for (const Isa& isa : compiled_isas()) {
    if (name != isa.name) continue;
    if (isa.supported) return isa;
    throw std::invalid_argument("ISA '" + name +
                                "' is not supported by this machine, which runs: " + names(true));
  }
  throw std::invalid_argument("unknown ISA '" + name + "'; this build has: " + names(false));
}

}  // namespace fused_adam
