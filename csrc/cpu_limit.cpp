#include "cpu_limit.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace fused_adam {
namespace {

constexpr int kNoLimit = std::numeric_limits<int>::max();

int cpus_of(double quota, double period) {
  if (!(quota > 0) || !(period > 0)) return kNoLimit;
  return std::max(1, static_cast<int>(std::ceil(std::min(quota / period, 1e6))));
}

int quota_in(std::istream& quota_file, std::istream& period_file) {
  double quota = 0, period = 0;
  return quota_file >> quota && period_file >> period ? cpus_of(quota, period) : kNoLimit;
}

// cgroup v2: one file, "max 100000" or "150000 100000".
int quota_v2(const std::string& group) {
  std::ifstream file("/sys/fs/cgroup" + group + "/cpu.max");
  return quota_in(file, file);
}

// cgroup v1: two files, the quota -1 where there is none.
int quota_v1(const std::string& group) {
  const std::string folder = "/sys/fs/cgroup/cpu" + group;
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us");
  std::ifstream period_file(folder + "/cpu.cfs_period_us");
  return quota_in(quota_file, period_file);
}

// The smallest quota of a group and of all its parents.
int smallest(int (*quota_of)(const std::string&), std::string group) {
  int limit = quota_of(group);
  while (!group.empty()) {
    group.erase(group.rfind('/'));
    limit = std::min(limit, quota_of(group));
  }
  return limit;
}

int cgroup_quota() {
  int limit = std::min(quota_v2(""), quota_v1(""));
  // Lines like "0::/user.slice" (v2) and "4:cpu,cpuacct:/docker/..." (v1).
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string group = line.substr(second + 1);
    if (group.empty() || group[0] != '/' || group == "/") continue;
    if (controllers == ",,") limit = std::min(limit, smallest(quota_v2, group));
    if (controllers.find(",cpu,") != std::string::npos) {
      limit = std::min(limit, smallest(quota_v1, group));
    }
  }
  return limit;
}

int quota_or_no_limit() noexcept {
  try {
    return cgroup_quota();
  } catch (...) {
    return kNoLimit;  // an unreadable quota is no quota
  }
}

int cpus_by_affinity() noexcept {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  // The mask of a machine with more CPUs than cpu_set_t holds (1024) does not fit.
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

int cpu_quota() noexcept {
  static const int quota = quota_or_no_limit();
  return quota;
}

int usable_cpus() noexcept { return std::max(1, std::min(cpus_by_affinity(), cpu_quota())); }

}  // namespace fused_adam
