// In place of src/cuda.cpp: the CPU's provider, and memory of its own that is full of NaN, as a GPU's may be.
#include <cstring>

#include "../src/cuda.hpp"

namespace headpool::detail {

void add_cuda(Ort::SessionOptions&) {}

Ort::MemoryInfo cuda_memory_info() { return Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault); }

std::shared_ptr<std::byte> cuda_memory(const Ort::Session&, std::size_t bytes) {
  const auto block = std::make_shared<std::unique_ptr<std::byte[]>>(new std::byte[bytes]);
  std::memset(block->get(), 0xFF, bytes);
  return {block, block->get()};
}

}  // namespace headpool::detail
