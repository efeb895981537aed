// gpu.hpp over TensorRT or TensorRT for RTX, which share their headers' names and nearly all that is in them, and CUDA's
// runtime.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <mutex>

#include "../guard.hpp"
#include "gpu.hpp"

namespace headpool::detail {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr bool RTX = true;
#else
constexpr bool RTX = false;
#endif

// The first error since `forget` in this thread; one of CUDA, which the lack of a GPU makes of everything, only where it is
// all.
class Log final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      if (error_.empty() || (of_cuda(error_) && !of_cuda(message))) error_ = message;
    } catch (...) {  // no memory for the message
    }
  }

  static void forget() { error_.clear(); }
  static std::string reason() { return error_.empty() ? "it gave no reason" : one_line(error_); }

 private:
  static bool of_cuda(std::string_view message) { return message.find("cudaError") != message.npos; }

  static thread_local std::string error_;
};

thread_local std::string Log::error_;

// One for the process, never ended: TensorRT may speak until its very end.
Log& log() {
  static Log* const log = new Log;
  return *log;
}

void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is told; the next call is not to find it
  const std::string why =
      std::string(doing) + ": " + cudaGetErrorString(status) + " (cudaError " + std::to_string(status) + ")";
  if (status == cudaErrorMemoryAllocation) throw MemoryError(why);
  throw BackendError(why);
}

constexpr const char* NO_GPU = "TensorRT engines run on an NVIDIA GPU, and there is none here, or no driver";

void check(bool done, const char* doing) {
  if (!done) throw BackendError(std::string("TensorRT failed in ") + doing + ": " + Log::reason());
}

std::string type_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return "fp32";
    case nvinfer1::DataType::kHALF:
      return "fp16";
    case nvinfer1::DataType::kBF16:
      return "bf16";
    case nvinfer1::DataType::kINT64:
      return "int64";
    default:
      return "type " + std::to_string(static_cast<int>(type));
  }
}

struct Loaded {
  int device;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::mutex mutex;  // of what makes contexts

  std::unique_ptr<nvinfer1::IExecutionContext> context(Profile profile) {
    const std::lock_guard lock(mutex);
#ifdef TRT_MAJOR_RTX
    if (profile ==
        Profile::decode) {  // it compiles kernels as it meets shapes; only its own capture knows when those are ready
      const std::unique_ptr<nvinfer1::IRuntimeConfig> config(engine->createRuntimeConfig());
      check(config && config->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE),
            "asking for a CUDA graph");
      return std::unique_ptr<nvinfer1::IExecutionContext>(engine->createExecutionContext(config.get()));
    }
#endif
    (void)profile;
    return std::unique_ptr<nvinfer1::IExecutionContext>(engine->createExecutionContext());
  }
};

class SdkLane final : public Lane {
 public:
  explicit SdkLane(std::shared_ptr<Loaded> loaded) : loaded_(std::move(loaded)) {
    enter();
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "no CUDA stream");
    stream_.reset(stream);
    for (const Profile profile : {Profile::prefill, Profile::decode}) {
      auto& context = contexts_[static_cast<int>(profile)];
      context = loaded_->context(profile);
      check(context != nullptr, "making an execution context");
      check(context->setOptimizationProfileAsync(static_cast<int>(profile), stream), "choosing an optimisation profile");
    }
  }
  ~SdkLane() override {
    if (stream_) cudaStreamSynchronize(stream_.get());
  }

  void enter() override {
    Log::forget();
    check(cudaSetDevice(loaded_->device), "the engine's GPU cannot be used");
  }

  std::shared_ptr<std::byte> device_memory(std::size_t bytes) override {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), ("no GPU memory for " + std::to_string(bytes / 1000000) + " MB").c_str());
    std::shared_ptr<std::byte> held(static_cast<std::byte*>(memory), [](std::byte* m) { cudaFree(m); });
    check(cudaMemsetAsync(memory, 0, bytes, stream_.get()), "clearing GPU memory");
    return held;
  }

  std::shared_ptr<std::byte> host_memory(std::size_t bytes) override {
    void* memory = nullptr;
    check(cudaMallocHost(&memory, bytes), "no page-locked memory");
    return {static_cast<std::byte*>(memory), [](std::byte* m) { cudaFreeHost(m); }};
  }

  void bind(const std::string& name, std::byte* device) override {
    for (const auto& context : contexts_) check(context->setTensorAddress(name.c_str(), device), "binding memory");
  }

  void set_shape(Profile profile, const std::string& name, std::span<const std::int64_t> shape) override {
    nvinfer1::Dims dims{static_cast<std::int32_t>(shape.size()), {}};
    for (std::size_t i = 0; i < shape.size(); ++i) dims.d[i] = shape[i];
    check(contexts_[static_cast<int>(profile)]->setInputShape(name.c_str(), dims), "setting a shape");
  }

  void copy(std::byte* to, const std::byte* from, std::size_t bytes) override {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_.get()), "a copy to or from the GPU failed");
  }

  void run(Profile profile) override { check(contexts_[static_cast<int>(profile)]->enqueueV3(stream_.get()), "a step"); }

  void capture(const std::function<void()>& work) override {
    // Of this thread alone: others may allocate memory meanwhile.
    check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "no CUDA graph");
    cudaGraph_t graph = nullptr;
    try {
      work();
    } catch (...) {
      if (cudaStreamEndCapture(stream_.get(), &graph) == cudaSuccess) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    check(cudaStreamEndCapture(stream_.get(), &graph), "a step cannot be captured as a CUDA graph");
    cudaGraphExec_t executable = nullptr;
    const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
    cudaGraphDestroy(graph);
    check(status, "a captured CUDA graph cannot be run");
    graph_.reset(executable);
  }

  void launch() override { check(cudaGraphLaunch(graph_.get(), stream_.get()), "a CUDA graph did not start"); }
  void wait() override { check(cudaStreamSynchronize(stream_.get()), "a step failed on the GPU"); }

 private:
  template <class Handle, cudaError_t (*destroy)(Handle)>
  struct Destroyed {
    using pointer = Handle;
    void operator()(Handle handle) const { destroy(handle); }
  };

  std::shared_ptr<Loaded> loaded_;
  std::unique_ptr<cudaStream_t, Destroyed<cudaStream_t, cudaStreamDestroy>> stream_;
  std::unique_ptr<nvinfer1::IExecutionContext> contexts_[2];
  std::unique_ptr<cudaGraphExec_t, Destroyed<cudaGraphExec_t, cudaGraphExecDestroy>> graph_;
};

class SdkEngine final : public Engine {
 public:
  explicit SdkEngine(std::shared_ptr<Loaded> loaded) : loaded_(std::move(loaded)) {}

  std::vector<EngineTensor> tensors() const override {
    const nvinfer1::ICudaEngine& engine = *loaded_->engine;
    std::vector<EngineTensor> result;
    for (int i = 0; i < engine.getNbIOTensors(); ++i) {
      const char* name = engine.getIOTensorName(i);
      const nvinfer1::Dims dims = engine.getTensorShape(name);
      const char* alias = engine.getAliasedInputTensor(name);
      std::string type = type_of(engine.getTensorDataType(name));
      if (engine.getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE) type += " in the host's memory";
      result.push_back({name,
                        engine.getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT,
                        type,
                        {dims.d, dims.d + std::max(0, dims.nbDims)},
                        alias ? alias : ""});
    }
    return result;
  }

  bool captures_itself() const override { return RTX; }
  std::unique_ptr<Lane> lane() const override { return std::make_unique<SdkLane>(loaded_); }

 private:
  std::shared_ptr<Loaded> loaded_;
};

class SdkGpu final : public Gpu {
 public:
  SdkGpu() : status_(cudaGetDevice(&device_)) { cudaGetLastError(); }

  std::string version() const override {
    char text[64];
    std::snprintf(text, sizeof text, "%d.%d.%d.%d", getInferLibMajorVersion(), getInferLibMinorVersion(),
                  getInferLibPatchVersion(), getInferLibBuildVersion());
    return text;
  }

  std::string name() const override {
    cudaDeviceProp properties{};
    check(status_, NO_GPU);
    check(cudaGetDeviceProperties(&properties, device_), "the GPU does not say what it is");
    return properties.name;
  }

  std::string chip() const override {
    int major = 0, minor = 0;
    check(status_, NO_GPU);
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "the GPU does not say what it is");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_), "the GPU does not say what it is");
    return "sm" + std::to_string(major) + std::to_string(minor);
  }

  std::shared_ptr<const Engine> load(std::span<const std::byte> plan, bool brings_runtime) const override {
    Log::forget();
    check(cudaSetDevice(device_), "the engine's GPU cannot be used");
    auto loaded = std::make_shared<Loaded>();
    loaded->device = device_;
    loaded->runtime.reset(nvinfer1::createInferRuntime(log()));
    check(loaded->runtime != nullptr, "starting");
    loaded->runtime->setEngineHostCodeAllowed(brings_runtime);
    loaded->engine.reset(loaded->runtime->deserializeCudaEngine(plan.data(), plan.size()));
    check(loaded->engine != nullptr, "reading the plan");
    return std::make_shared<SdkEngine>(std::move(loaded));
  }

 private:
  int device_ = 0;  // current in the thread that opened the model
  cudaError_t status_;
};

}  // namespace

std::shared_ptr<const Gpu> tensorrt(const std::string& backend) {
  const std::string here = RTX ? "tensorrt-rtx" : "tensorrt";
  if (backend != here)
    throw BackendError("backend " + backend + " is not in this libheadpool, which was built with the SDK of " + here +
                       "; take that, or build it with cmake -DHEADPOOL_TENSORRT=" + backend);
  if (getInferLibMajorVersion() != NV_TENSORRT_MAJOR)
    throw BackendError("libheadpool was built for TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + ", and runs with " +
                       std::to_string(getInferLibMajorVersion()));
  return std::make_shared<SdkGpu>();
}

}  // namespace headpool::detail
