// Counts what allocates: operator new and malloc and their like, of the whole process, and whose each of them is.
#pragma once

#include <link.h>
#include <malloc.h>
#include <unwind.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
}

namespace allocations {

inline std::atomic<long> all{0};          // by operator new
inline std::atomic<long> of_headpool{0};  // of any kind, while `attributing`
inline std::atomic<bool> attributing{false};

// Where a library's code lies, by its name; begin == end where it is not loaded.
struct Code {
  std::uintptr_t begin = 0, end = 0;
  bool holds(std::uintptr_t at) const { return begin <= at && at < end; }
};

inline Code code_of(const char* name) {
  struct Search {
    const char* name;
    Code found;
  } search{name, {}};
  dl_iterate_phdr(
      [](dl_phdr_info* library, std::size_t, void* data) {
        Search& wanted = *static_cast<Search*>(data);
        if (!std::strstr(library->dlpi_name, wanted.name)) return 0;
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& part = library->dlpi_phdr[i];
          if (part.p_type != PT_LOAD || !(part.p_flags & PF_X)) continue;
          wanted.found.begin = library->dlpi_addr + part.p_vaddr;
          wanted.found.end = wanted.found.begin + part.p_memsz;
        }
        return 1;
      },
      &search);
  return search.found;
}

inline const Code headpool = code_of("libheadpool.so"), onnxruntime = code_of("libonnxruntime.so");

// An allocation belongs to whichever of the two libraries is found first on the way out: those of the C++ library in between
// to the one that called it.
inline void attribute() {
  static thread_local bool busy = false;  // the unwinder may allocate
  if (!attributing || busy) return;
  busy = true;
  _Unwind_Backtrace(
      [](_Unwind_Context* context, void*) {
        const std::uintptr_t at = _Unwind_GetIP(context);
        if (headpool.holds(at)) ++of_headpool;
        return headpool.holds(at) || onnxruntime.holds(at) ? _URC_END_OF_STACK : _URC_NO_REASON;
      },
      nullptr);
  busy = false;
}

}  // namespace allocations

[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations::all;
  allocations::attribute();
  if (void* memory = __libc_malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

extern "C" {
void* malloc(std::size_t size) {
  allocations::attribute();
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) {
  allocations::attribute();
  return __libc_calloc(count, size);
}
void* realloc(void* memory, std::size_t size) {
  allocations::attribute();
  return __libc_realloc(memory, size);
}
void* memalign(std::size_t alignment, std::size_t size) {
  allocations::attribute();
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) { return memalign(alignment, size); }
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  *memory = memalign(alignment, size);
  return *memory ? 0 : 12;  // ENOMEM
}
}
