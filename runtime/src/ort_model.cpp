#include "ort_model.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "cores.hpp"
#include "cuda.hpp"
#include "guard.hpp"
#include "initializers.hpp"

// headpool's operators (ops/library.cpp), compiled into this library; CMakeLists.txt gives the function a name of its own.
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

namespace headpool::detail {

void start_onnxruntime() {
  static const OrtApi* const api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!api)
    throw BackendError(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() + " is older than 1." +
                       std::to_string(ORT_API_VERSION) + ", which this library was built for");
  static std::once_flag once;
  std::call_once(once, [] { Ort::InitApi(api); });
}

namespace {

// ONNX Runtime crashes where memory ends while it registers its operators, which takes megabytes.
constexpr std::size_t ENVIRONMENT_BYTES = 32 << 20;

// One for the process, never ended: models may be held until its very end.
Ort::Env& environment() {
  static Ort::Env* const env = [] {
    void* const volatile room = std::malloc(ENVIRONMENT_BYTES);
    if (!room) throw MemoryError("not enough memory to begin: ONNX Runtime wants 32 MB");
    std::free(room);
    return new Ort::Env(ORT_LOGGING_LEVEL_FATAL, "headpool");  // errors come as exceptions
  }();
  return *env;
}

[[noreturn]] void cut_short(const std::string& file, std::uintmax_t size) {
  throw BundleError(one_line(file) + " is cut short, it has " + std::to_string(size) + " bytes; export the bundle again");
}

bool reaches(const Initializer& weight, std::uintmax_t size) {
  return weight.offset <= size && weight.length <= size - weight.offset;
}

// What a graph reads from other files, all of which are there and long enough: ONNX Runtime would not say what to do.
std::vector<Initializer> weights_of(const std::filesystem::path& bundle, const std::string& name) {
  const auto graph = shared_file(file_in(bundle, name));
  std::vector<Initializer> weights = external_initializers({graph->data(), graph->size()}, one_line(name));
  for (const Initializer& weight : weights) {
    const std::uintmax_t size = std::filesystem::file_size(file_in(bundle, weight.file));
    if (!reaches(weight, size)) cut_short(weight.file, size);
  }
  return weights;
}

// Where a weight lies in its file's bytes, or a copy of it: in a safetensors file tensors may begin at any byte, and floats are
// read where whole ones lie.
std::byte* aligned(const Initializer& weight, const Memory& file, std::vector<Memory>& copies) {
  std::byte* data = file.data() + weight.offset;
  if (weight.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || weight.offset % alignof(float) == 0) return data;
  copies.emplace_back(weight.length);
  std::memcpy(copies.back().data(), data, weight.length);
  return copies.back().data();
}

// headpool's operators, and the weights that they read where they lie, in memory of ours. (Other patterns' weights the runtime
// copies into layouts of its own. So it does with AddExternalInitializersFromFilesInMemory, which would be simpler.)
void use_own_operators(Ort::SessionOptions& options, const std::filesystem::path& bundle,
                       const std::vector<Initializer>& weights, OrtModel& state) {
  Ort::ThrowOnError(RegisterCustomOps(options, OrtGetApiBase()));
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  for (const Initializer& weight : weights) {
    const auto file = state.weights.try_emplace(weight.file).first;
    if (!file->second) file->second = shared_file(file_in(bundle, weight.file));
    const Memory& bytes = *file->second;
    if (!reaches(weight, bytes.size())) cut_short(weight.file, bytes.size());  // the file is another one by now
    state.values.push_back(Ort::Value::CreateTensor(memory, aligned(weight, bytes, state.copies), weight.length,
                                                    weight.shape.data(), weight.shape.size(),
                                                    static_cast<ONNXTensorElementDataType>(weight.type)));
    options.AddInitializer(weight.name.c_str(), state.values.back());
  }
}

using Shape = std::vector<std::int64_t>;  // −1: any

void expect_value(const std::string& name, ONNXTensorElementDataType type, const Shape& shape, const Ort::TypeInfo& info) {
  if (info.GetONNXType() == ONNX_TYPE_TENSOR) {
    const auto tensor = info.GetTensorTypeAndShapeInfo();
    if (tensor.GetElementType() == type && tensor.GetShape() == shape) return;
  }
  throw BundleError("the graph's " + one_line(name) + " is not what headpool.json says; export the bundle again");
}

struct Named {
  std::string name;
  ONNXTensorElementDataType type;
  Shape shape;
};
using Tensors = std::vector<Named>;

constexpr auto INT = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

// The graph has these inputs and outputs, with those types and sizes, and no others.
void check_graph(const Ort::Session& runtime, const Tensors& inputs, const Tensors& outputs) {
  Ort::AllocatorWithDefaultOptions allocator;
  const auto check = [&](const Tensors& expected, std::size_t count, const auto& name_of, const auto& type_of) {
    if (count != expected.size())
      throw BundleError("the graph has " + std::to_string(count) + " inputs or outputs, headpool.json names " +
                        std::to_string(expected.size()) + "; export the bundle again");
    for (std::size_t i = 0; i < count; ++i) {
      const std::string name = name_of(i);
      const auto found = std::ranges::find(expected, name, &Named::name);
      if (found == expected.end())
        throw BundleError("headpool.json does not name the graph's " + one_line(name).substr(0, 60) +
                          "; export the bundle again");
      expect_value(name, found->type, found->shape, type_of(i));
    }
  };
  check(
      inputs, runtime.GetInputCount(),
      [&](std::size_t i) { return std::string(runtime.GetInputNameAllocated(i, allocator).get()); },
      [&](std::size_t i) { return runtime.GetInputTypeInfo(i); });
  check(
      outputs, runtime.GetOutputCount(),
      [&](std::size_t i) { return std::string(runtime.GetOutputNameAllocated(i, allocator).get()); },
      [&](std::size_t i) { return runtime.GetOutputTypeInfo(i); });
}

void add_caches(Tensors& tensors, const std::vector<CacheBinding>& caches, std::string CacheBinding::* name) {
  for (const CacheBinding& cache : caches)
    tensors.push_back({cache.*name, element_of(cache.type), {-1, cache.heads, -1, cache.size}});
}

void check_decoder(const OrtModel& state) {
  const Variant& v = state.variant;
  Tensors inputs, outputs{{v.logits, state.element(), {-1, v.all_logits ? -1 : 1, v.info.vocab_size}}};
  for (const std::string& name : {v.tokens, v.positions, v.mask, v.encoder ? v.encoder->decoder_mask : ""})
    if (!name.empty()) inputs.push_back({name, INT, {-1, -1}});
  add_caches(inputs, v.caches, &CacheBinding::past);
  add_caches(outputs, v.caches, &CacheBinding::present);
  if (v.encoder) add_caches(inputs, v.encoder->caches, &CacheBinding::past);
  check_graph(state.runtime, inputs, outputs);
}

void check_encoder(const OrtModel& state) {
  const Encoder& e = *state.variant.encoder;
  const Tensors inputs{{e.tokens, INT, {-1, -1}}, {e.mask, INT, {-1, -1}}};
  Tensors outputs{{e.hidden, state.element(), {-1, -1, e.hidden_size}}};
  add_caches(outputs, e.caches, &CacheBinding::present);
  check_graph(state.encoder, inputs, outputs);
}

void expect_cuda_runs(const Variant& variant) {
  const std::string name = one_line("variant " + variant.info.variant);
  if (variant.info.pattern == "fused")
    throw BackendError(name +
                       " is in pattern fused, whose operators compute on the CPU; on onnxruntime-cuda take another pattern");
  if (!variant.in_place)
    throw BackendError(name + " has a concat cache, and onnxruntime-cuda takes static ones; export it with --cache static");
}

}  // namespace

std::shared_ptr<std::byte> OrtModel::zeros(std::size_t bytes) const {
  if (!cuda) {
    const auto block = std::make_shared<Memory>(bytes);
    return {block, block->data()};
  }
  const auto block = cuda_memory(runtime, bytes);
  zeroing->fill(memory, block.get(), bytes);
  return block;
}

std::shared_ptr<const Model::State> open_onnxruntime(const std::filesystem::path& bundle, Variant chosen, int threads,
                                                     bool cuda) {
  start_onnxruntime();
  environment();  // before the first value: what is wrong with one goes through its logger
  if (cuda) expect_cuda_runs(chosen);
  BackendInfo backend{"onnxruntime", "CPUExecutionProvider", "onnxruntime", OrtGetApiBase()->GetVersionString()};
  if (cuda) backend.name = "onnxruntime-cuda", backend.provider = "CUDAExecutionProvider";
  auto state = std::make_shared<OrtModel>(std::move(chosen), std::move(backend), threads ? threads : default_threads());
  state->cuda = cuda;
  state->memory = cuda ? cuda_memory_info() : Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Variant& variant = state->variant;
  for (const std::string& name : variant.weights) file_in(bundle, name);
  const auto load = [&](const std::string& name, const auto& work) {
    guarded("ONNX Runtime cannot run " + name + " (pattern " + variant.info.pattern + ", " + variant.info.dtype + ")", [&] {
      Ort::SessionOptions session;
      session.SetIntraOpNumThreads(state->threads);
      session.SetInterOpNumThreads(1);
      session.SetGraphOptimizationLevel(ORT_ENABLE_ALL);
      const std::vector<Initializer> weights = weights_of(bundle, name);
      if (variant.info.pattern == "fused") use_own_operators(session, bundle, weights, *state);
      if (cuda) add_cuda(session);
      work(bundle / name, session);
    });
  };
  load(variant.graph, [&](const std::filesystem::path& graph, Ort::SessionOptions& session) {
    if (!variant.in_place) session.DisableMemPattern();  // concat has new shapes each step, and each would be planned
    if (cuda) state->zeroing.emplace(environment(), session);
    state->runtime = Ort::Session(environment(), graph.c_str(), session);
    check_decoder(*state);
  });
  if (variant.encoder)
    load(variant.encoder->graph, [&](const std::filesystem::path& graph, Ort::SessionOptions& session) {
      session.DisableCpuMemArena();  // it would keep, for the next long input, the gigabytes of one
      session.DisableMemPattern();
      state->encoder = Ort::Session(environment(), graph.c_str(), session);
      check_encoder(*state);
    });
  return state;
}

}  // namespace headpool::detail
