// What this processor runs of the instruction sets that the kernels are compiled for.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

namespace headpool {

inline bool is_amd() {
  __builtin_cpu_init();  // which a constructor of a library may come before
  return __builtin_cpu_is("amd");
}

// Not every compiler's __builtin_cpu_supports knows F16C, conversion of halves.
inline bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

inline bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

inline bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

inline bool runs_avx512vnni() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }

}  // namespace headpool
#endif
