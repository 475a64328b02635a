// How many CPUs this process may use.
#pragma once

namespace fused_adam {

// The CPUs of the calling thread's affinity mask as it is now, at most as many as the cgroup's CPU
// quota pays for (rounded up; read at the first call). At least 1.
int usable_cpus() noexcept;

}  // namespace fused_adam
