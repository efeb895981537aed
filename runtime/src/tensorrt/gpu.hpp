// The few things of TensorRT and CUDA that a session does. Behind this interface it can be tested without either: sdk.cpp is
// the real one, absent.cpp what is compiled without the SDK, tests/fake_tensorrt.cpp one that ONNX Runtime computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace headpool::detail {

// An input or output of an engine. −1 in `shape`: T new tokens. `alias`: the input whose memory an output is; else empty.
struct EngineTensor {
  std::string name;
  bool input;
  std::string dtype;  // as headpool.json has it: int64, fp32, fp16, bf16
  std::vector<std::int64_t> shape;
  std::string alias;

  bool operator==(const EngineTensor&) const = default;
};

enum class Profile { prefill, decode };  // in the order they were built

// An execution context for each profile, on a stream, where work is done in the order it was given. Used by one thread at a
// time. Throws BackendError, MemoryError.
class Lane {
 public:
  virtual ~Lane() = default;

  virtual void enter() = 0;  // makes the engine's GPU the calling thread's

  virtual std::shared_ptr<std::byte> device_memory(std::size_t bytes) = 0;  // zeros
  virtual std::shared_ptr<std::byte> host_memory(std::size_t bytes) = 0;    // that the GPU copies from and to by itself

  virtual void bind(const std::string& name, std::byte* device) = 0;  // in both contexts
  virtual void set_shape(Profile profile, const std::string& name, std::span<const std::int64_t> shape) = 0;

  virtual void copy(std::byte* to, const std::byte* from, std::size_t bytes) = 0;
  virtual void run(Profile profile) = 0;

  virtual void capture(const std::function<void()>& work) = 0;  // the copies and runs it asks for, which are not done yet
  virtual void launch() = 0;                                    // does what was captured
  virtual void wait() = 0;
};

// A deserialised plan. May be used from several threads.
class Engine {
 public:
  virtual ~Engine() = default;
  virtual std::vector<EngineTensor> tensors() const = 0;
  virtual bool captures_itself() const = 0;  // so that decoding must not be captured once more
  virtual std::unique_ptr<Lane> lane() const = 0;
};

class Gpu {
 public:
  virtual ~Gpu() = default;
  virtual std::string version() const = 0;  // of the TensorRT that is running, for example "1.7.1.116"
  virtual std::string name() const = 0;     // "NVIDIA L4". Throws as chip does
  virtual std::string chip() const = 0;     // "sm89". Throws BackendError where there is no GPU or driver.

  // `brings_runtime`: the plan holds code of the version that built it, which is to be run. Throws BackendError.
  virtual std::shared_ptr<const Engine> load(std::span<const std::byte> plan, bool brings_runtime) const = 0;
};

// The TensorRT of that name ("tensorrt", "tensorrt-rtx"). Throws BackendError where this library was built without it.
std::shared_ptr<const Gpu> tensorrt(const std::string& backend);

}  // namespace headpool::detail
