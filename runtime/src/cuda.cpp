#include "cuda.hpp"

#include <algorithm>
#include <headpool/error.hpp>
#include <string>
#include <vector>

#include "guard.hpp"

namespace headpool::detail {

void add_cuda(Ort::SessionOptions& options) {
  const std::vector<std::string> available = Ort::GetAvailableProviders();
  if (std::ranges::find(available, "CUDAExecutionProvider") == available.end()) {
    std::string names;
    for (const std::string& name : available) names += (names.empty() ? "" : ", ") + name;
    throw BackendError(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                       " here has no CUDAExecutionProvider (it has " + names +
                       "); put the library of onnxruntime-gpu in its place, or take backend onnxruntime");
  }
  const OrtApi& api = Ort::GetApi();
  OrtCUDAProviderOptionsV2* made = nullptr;
  Ort::ThrowOnError(api.CreateCUDAProviderOptions(&made));
  const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api.ReleaseCUDAProviderOptions)> provider(
      made, api.ReleaseCUDAProviderOptions);
  options.AppendExecutionProvider_CUDA_V2(*provider);
}

Ort::MemoryInfo cuda_memory_info() { return {"Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault}; }

std::shared_ptr<std::byte> cuda_memory(const Ort::Session& runtime, std::size_t bytes) {
  const auto allocator = std::make_shared<Ort::Allocator>(runtime, cuda_memory_info());
  try {
    return {static_cast<std::byte*>(allocator->Alloc(bytes)), [allocator](std::byte* data) { allocator->Free(data); }};
  } catch (const Ort::Exception& error) {
    throw MemoryError(one_line("no GPU memory for " + std::to_string(bytes / 1000000) +
                               " MB; lower the batch or the capacity: " + error.what()));
  }
}

}  // namespace headpool::detail
