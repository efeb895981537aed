#include "cores.hpp"

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#ifdef __linux__
#include <sched.h>
#endif

namespace headpool::detail {

namespace {

std::string text_of(const std::filesystem::path& file) {
  std::ifstream in(file);
  return {std::istreambuf_iterator<char>(in), {}};
}

// CPUs' worth of time that the cgroup of `folder` has itself, rounded up: of "200000 100000", quota and period in µs, but not
// of "max 100000" (version 2) or -1 and 100000 (version 1). 0 where there is no limit.
int quota_in(const std::filesystem::path& folder, bool version2) {
  std::istringstream words(version2 ? text_of(folder / "cpu.max")
                                    : text_of(folder / "cpu.cfs_quota_us") + text_of(folder / "cpu.cfs_period_us"));
  long long quota = 0, period = 0;
  if (!(words >> quota >> period) || quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::min<long long>((quota - 1) / period + 1, 1 << 20));
}

}  // namespace

// A cgroup is also bound by those above it. In a container their names may be those of the host, of which only the last one
// above, the container's own, is mounted.
int cpu_quota(const std::filesystem::path& root) {
  int least = 0;
  std::ifstream file(root / "proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {  // id:controllers:/path, without controllers of version 2
    const auto first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool version2 = controllers.empty();
    if (!version2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const auto take = [&](const std::filesystem::path& folder) {
      const int quota = quota_in(folder, version2);
      if (quota) least = least ? std::min(least, quota) : quota;
    };
    std::filesystem::path folder = root / "sys/fs/cgroup" / controllers;
    take(folder);
    for (const auto& name : std::filesystem::path(line.substr(second + 1)).relative_path()) take(folder /= name);
  }
  return least;
}

int physical_cores(const std::filesystem::path& root) {
  int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#ifdef __linux__
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::set<std::string> found;  // each by the list of its threads
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      std::ifstream file(root / ("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list"));
      std::string siblings;
      found.insert(std::getline(file, siblings) ? siblings : std::to_string(cpu));
    }
    if (!found.empty()) cores = static_cast<int>(found.size());
  }
#endif
  const int quota = cpu_quota(root);
  return quota ? std::min(cores, quota) : cores;
}

}  // namespace headpool::detail
