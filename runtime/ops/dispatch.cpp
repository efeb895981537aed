#include "kernels.hpp"
#include "processor.hpp"

namespace headpool {

namespace plain {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512vnni {
extern const Kernels table;
}
#endif

const Kernels& kernels() {
  static const Kernels& best = []() -> const Kernels& {
#if defined(__x86_64__)
    if (runs_avx512vnni()) return avx512vnni::table;
    if (runs_avx512()) return avx512::table;
    if (runs_avx2()) return avx2::table;
#endif
    return plain::table;
  }();
  return best;
}

// Measured: Zen 4 is faster with the next line, an Intel Xeon with one 2 kB ahead.
#if defined(__x86_64__)
const size_t floats_ahead = is_amd() ? 16 : 512;
#else
const size_t floats_ahead = 512;
#endif

}  // namespace headpool
