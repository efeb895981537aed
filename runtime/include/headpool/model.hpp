// A variant of a bundle, loaded: its graph in ONNX Runtime or its engines in TensorRT. Sessions of one model share the weights.
#pragma once

#include <headpool/api.h>

#include <cstdint>
#include <filesystem>
#include <headpool/error.hpp>
#include <memory>
#include <string>
#include <vector>

namespace headpool {

using Token = std::int64_t;

// What a bundle says about one variant.
struct ModelInfo {
  std::string variant;      // "g4", or "g4.fused" where the bundle holds several patterns
  std::string pattern;      // fused, grouped, gqa, attention or repeat
  std::string cache;        // static or concat
  std::string dtype;        // fp32, fp16 or bf16
  std::string quantize;     // int8 or int4, or such with -128 or -zp: how its matrices are stored; empty: in dtype
  std::string cache_dtype;  // fp16 or int8, how its caches are stored; empty: in dtype
  std::int64_t vocab_size = 0;
  std::int64_t max_positions = 0;        // tokens of a sequence that the model was made for
  std::int64_t heads = 0;                // query heads
  std::vector<std::int64_t> kv_heads;    // KV heads of each layer
  std::int64_t encoder_layers = 0;       // of an encoder-decoder, whose other sizes are its decoder's; 0: it has no encoder
  std::vector<Token> stop_ids;           // tokens that end a text
  std::uint64_t weight_bytes = 0;        // that one decode step reads
  std::uint64_t kv_bytes_per_token = 0;  // of one sequence, all layers
};

// What runs a model.
struct BackendInfo {
  std::string name;      // onnxruntime, onnxruntime-cuda, tensorrt or tensorrt-rtx
  std::string provider;  // ONNX Runtime's execution provider; of TensorRT the GPU, for example "NVIDIA L4 (sm89)"
  std::string library;   // onnxruntime, tensorrt or tensorrt_rtx
  std::string version;   // of the library that is running, for example "1.31.1"
};

struct ModelOptions {
  std::string variant;  // empty: the bundle's first
  int threads = 0;      // of one operator, at most 1024; 0: default_threads()
  // onnxruntime (so does empty): the CPU. onnxruntime-cuda: the first GPU, by the provider that onnxruntime-gpu's library has;
  // static caches, every pattern but fused. Where this library was built with that SDK, tensorrt or tensorrt-rtx, which run the
  // bundle's engines (headpool build) on the calling thread's GPU.
  std::string backend = {};
};

// The physical cores that this process may use, or its cgroups' CPU time where that is less.
HEADPOOL_API int default_threads();

// The variants that the bundle in folder `bundle` holds. Throws BundleError.
HEADPOOL_API std::vector<ModelInfo> variants(const std::filesystem::path& bundle);

// A handle: copies are the same model, which lives as long as any of them or any session does. Moving one copies it.
//
// Threads: all of it may be used from several threads at once. Sessions of one model that run at the same time share its
// `threads` threads; a model opened a second time has threads of its own and still shares the weights in pattern fused.
//
// Files: a bundle that is open may be moved or removed, or another put in its place, but its files must not be written over or
// cut short where they lie: in patterns other than fused ONNX Runtime reads weights from mapped files as they are used. An
// engine of TensorRT's is read when the first session needs it.
class HEADPOOL_API Model {
 public:
  // Reads headpool.json in folder `bundle` and loads a variant. Throws BundleError, BackendError, MemoryError, ArgumentError.
  static Model open(const std::filesystem::path& bundle, const ModelOptions& options = {});
  Model(const Model&) = default;
  Model& operator=(const Model&) = default;

  const ModelInfo& info() const noexcept;
  int threads() const noexcept;
  const BackendInfo& backend() const noexcept;

  struct State;

 private:
  friend class Session;
  explicit Model(std::shared_ptr<const State> state) : state_(std::move(state)) {}
  std::shared_ptr<const State> state_;
};

// Of the ONNX Runtime this library runs on, for example "1.31.1". Throws BackendError where it is too old.
HEADPOOL_API std::string onnxruntime_version();

}  // namespace headpool
