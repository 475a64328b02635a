// How many CPUs this process may use.
#pragma once

namespace fused_adam {

// As many CPUs as the cgroup's CPU quota pays for: rounded up, at least 1; read at the first call.
int cpu_quota() noexcept;

// The CPUs of the calling thread's affinity mask as it is now, at most cpu_quota(). At least 1.
int usable_cpus() noexcept;

}  // namespace fused_adam
