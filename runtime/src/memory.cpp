#include "memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <headpool/error.hpp>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace headpool::detail {

constexpr std::size_t PAGE = 2 << 20;

Memory::Memory(std::size_t bytes) : mapped_(bytes + PAGE), size_(bytes) {  // a page more, to start on a whole one
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;  // a cache is reserved for its whole capacity, and mostly not filled
#endif
  if (mapped_ < bytes) mapped_ = SIZE_MAX;
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw MemoryError("no memory for " + std::to_string(mapped_ / 1000000) + " MB");
  }
#ifdef MADV_HUGEPAGE
  if (bytes >= PAGE) madvise(mapping_, mapped_, MADV_HUGEPAGE);  // a kernel without huge pages goes on with small ones
#endif
  const auto start = reinterpret_cast<std::uintptr_t>(mapping_);
  data_ = static_cast<std::byte*>(mapping_) + (PAGE - start % PAGE) % PAGE;
}

Memory::~Memory() {
  if (mapping_) munmap(mapping_, mapped_);
}

std::size_t bytes_of(std::initializer_list<std::int64_t> sizes, std::size_t item) {
  std::size_t bytes = item;
  for (const std::int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(size), &bytes) || bytes > SIZE_MAX / 4)
      throw MemoryError("inputs and outputs of that size have no address; lower the batch or the capacity");
  return bytes;
}

namespace {

struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) close(number);
  }
};

// From `at` on, the first place of the file that is not in a hole; `end` where there is none. Holes read as zeros, which new
// memory is: a sparse file of terabytes costs what lies in it.
std::size_t next_data(int file, std::size_t at, std::size_t end) {
#ifdef SEEK_DATA
  const off_t found = lseek(file, static_cast<off_t>(at), SEEK_DATA);
  if (found < 0 && errno == ENXIO) return end;
  if (found >= 0) return std::min(static_cast<std::size_t>(found), end);
#endif  // nor does every file system tell
  return at;
}

void read_whole(int file, const Memory& memory, const std::filesystem::path& path) {
  constexpr std::size_t AT_ONCE = 64 << 20;  // so that a hole is looked for now and then
  for (std::size_t done = next_data(file, 0, memory.size()); done < memory.size();) {
    const std::size_t most = std::min(AT_ONCE, memory.size() - done);
    const ssize_t count = pread(file, memory.data() + done, most, static_cast<off_t>(done));
    if (count <= 0) throw BundleError(path.string() + " cannot be read to its end");
    done = next_data(file, done + static_cast<std::size_t>(count), memory.size());
  }
  struct stat status{};
  if (fstat(file, &status) != 0 || static_cast<std::size_t>(status.st_size) < memory.size())  // cut while it was read
    throw BundleError(path.string() + " cannot be read to its end");
}

}  // namespace

std::shared_ptr<const Memory> shared_file(const std::filesystem::path& path) {
  using Key = std::tuple<dev_t, ino_t, off_t, std::int64_t, std::int64_t>;
  static std::mutex mutex;
  static std::map<Key, std::weak_ptr<const Memory>> files;

  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  struct stat status{};
  if (file.number < 0 || fstat(file.number, &status) != 0) throw BundleError(path.string() + " cannot be read");
  const Key key{status.st_dev, status.st_ino, status.st_size, status.st_mtim.tv_sec, status.st_mtim.tv_nsec};
  const std::lock_guard lock(mutex);
  std::erase_if(files, [](const auto& entry) { return entry.second.expired(); });
  if (auto known = files[key].lock()) return known;
  auto memory = std::make_shared<Memory>(static_cast<std::size_t>(status.st_size));
  read_whole(file.number, *memory, path);
  files[key] = memory;
  return memory;
}

}  // namespace headpool::detail
