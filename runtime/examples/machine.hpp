// The machine a figure was measured on, from where profiles/machine.py takes it: a test compares the two.
#pragma once

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

namespace machine {

// What decides the speed of a matrix product or of a conversion between dtypes on x86-64 and Arm.
inline constexpr const char* FLAGS[] = {
    "fma",         "f16c",     "avx",      "avx2",     "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "neon",    "asimd",       "asimdhp",
    "asimddp",     "bf16",     "i8mm",     "sve",      "sve2",     "sme",
};

// The first value of `key` in a file of /proc whose lines are "key : value"; empty where there is none.
inline std::string value_of(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(':');
    if (colon == std::string::npos || line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1) != key) continue;
    const auto begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

// Bytes of the largest cache the kernel reports for the first CPU; 0 where it reports none.
inline std::int64_t l3_bytes() {
  std::int64_t largest = 0;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/devices/system/cpu/cpu0/cache", none)) {
    std::ifstream file(entry.path() / "size");
    std::int64_t size = 0;
    char unit = 0;
    if (!(file >> size)) continue;
    file >> unit;
    largest = std::max(largest, size << (unit == 'K' ? 10 : unit == 'M' ? 20 : unit == 'G' ? 30 : 0));
  }
  return largest;
}

inline nlohmann::json record(const nlohmann::json& gpus) {
  utsname os{};
  uname(&os);
  double load = 0;
  if (getloadavg(&load, 1) != 1) load = 0;
  cpu_set_t usable;
  CPU_ZERO(&usable);
  const long cpus = sched_getaffinity(0, sizeof usable, &usable) == 0 ? CPU_COUNT(&usable) : sysconf(_SC_NPROCESSORS_ONLN);
  const std::string cpu = value_of("/proc/cpuinfo", "model name"), x86 = value_of("/proc/cpuinfo", "flags");
  const std::string words = " " + (x86.empty() ? value_of("/proc/cpuinfo", "Features") : x86) + " ";
  nlohmann::json flags = nlohmann::json::array();
  for (const std::string flag : FLAGS)
    if (words.find(" " + flag + " ") != std::string::npos) flags.push_back(flag);
  std::string name = std::string(os.sysname) + "-" + os.release + "-" + os.machine;
#ifdef _CS_GNU_LIBC_VERSION
  char libc[64] = "";
  if (confstr(_CS_GNU_LIBC_VERSION, libc, sizeof libc)) name += std::string("-with-") + libc;
  name.erase(std::remove(name.begin(), name.end(), ' '), name.end());  // "glibc 2.36"
#endif
  return {{"cpu", cpu.empty() ? os.machine : cpu},
          {"cores", headpool::default_threads()},
          {"cpus", cpus},
          {"memory_bytes", 1024 * std::atoll(value_of("/proc/meminfo", "MemTotal").c_str())},
          {"l3_bytes", l3_bytes()},
          {"flags", flags},
          {"os", name},
          {"gpus", gpus},
          {"load", load}};
}

}  // namespace machine
