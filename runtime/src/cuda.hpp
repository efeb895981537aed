// What ONNX Runtime's CUDA provider is asked for. Behind these functions sessions on a device can be tested without one:
// cuda.cpp has the real ones, tests/fake_cuda.cpp some of the CPU's.
#pragma once

#include <cstddef>
#include <memory>

#include "onnxruntime.hpp"

namespace headpool::detail {

// Throws BackendError where this ONNX Runtime was built without the provider, or it does not start.
void add_cuda(Ort::SessionOptions& options);

// The name of its memory.
Ort::MemoryInfo cuda_memory_info();

// Memory of any content from the allocator of `runtime`, which outlives it. Throws MemoryError.
std::shared_ptr<std::byte> cuda_memory(const Ort::Session& runtime, std::size_t bytes);

}  // namespace headpool::detail
