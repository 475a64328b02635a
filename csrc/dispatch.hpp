// Which instruction sets this build has, which of them this machine runs, and which to take.
#pragma once

#include <string>
#include <vector>

#include "kernel/kernel.hpp"

namespace fused_adam {

struct Isa {
  const char* name;
  bool supported;  // by the CPU and by the operating system
  const StageTable* stages;
};

// Every ISA of this build, best first; the last one runs everywhere.
const std::vector<Isa>& compiled_isas();

// The ISA of that name. Throws std::invalid_argument where it is unknown, not in this build, or not
// supported here: never a silent fallback.
const Isa& isa_by_name(const std::string& name);

}  // namespace fused_adam
