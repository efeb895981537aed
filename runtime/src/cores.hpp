#pragma once

#include <filesystem>

namespace headpool::detail {

// Cores this process may use, at least 1: hyper-threads not counted, as both threads of a core share the units that attention
// needs, and no more than its cgroups' CPU time. `root` has proc and sys. exporter/engines/cores.py counts the same.
int physical_cores(const std::filesystem::path& root = "/");

// CPUs' worth of time that the cgroups of this process (version 2 or 1) leave it, rounded up; 0 where they set no limit.
int cpu_quota(const std::filesystem::path& root = "/");

}  // namespace headpool::detail
