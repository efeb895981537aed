// How many threads a model gets that is not told, and the CPUs of its cgroups: cores ROOT, a folder with proc and sys.
#include "../src/cores.hpp"

#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::printf("%d %d\n", headpool::detail::physical_cores(argv[1]), headpool::detail::cpu_quota(argv[1]));
}
