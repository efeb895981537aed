// Memory for weights and caches: on pages of 2 MB where the kernel has some, which reading at the memory's speed gains a fifth
// from (exporter/engines/huge_pages.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <utility>

namespace headpool::detail {

// Zeroed memory that costs nothing until it is written.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes);  // throws MemoryError
  Memory(Memory&& other) noexcept { *this = std::move(other); }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(mapping_, other.mapping_), std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }
  ~Memory();

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* mapping_ = nullptr;
  std::size_t mapped_ = 0;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// The bytes of so many values of so many bytes each. Throws MemoryError where they have no address.
std::size_t bytes_of(std::initializer_list<std::int64_t> sizes, std::size_t item);

// The bytes of a file, read once for all that hold them at the same time. Throws BundleError, MemoryError.
std::shared_ptr<const Memory> shared_file(const std::filesystem::path& path);

}  // namespace headpool::detail
