// In place of TensorRT and a GPU: a "plan" is the path of the ONNX graph it stands for, which ONNX Runtime computes in the
// memory that the session bound. It is strict where the real ones are not so kind: a wrong binding, a shape outside the
// profile, memory of another kind, an output elsewhere than the input it aliases, or work that nobody waited for end the
// program.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <headpool/error.hpp>
#include <map>

#include "../src/onnxruntime.hpp"
#include "../src/tensorrt/gpu.hpp"

#define EXPECT(holds)                                                      \
  do {                                                                     \
    if (!(holds)) {                                                        \
      std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #holds); \
      std::abort();                                                        \
    }                                                                      \
  } while (false)

namespace headpool::detail {
namespace {

struct Counts {
  std::atomic<int> lanes, allocations, runs, captures, launches;
} counts;

const std::map<std::string, ONNXTensorElementDataType> TYPES{{"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},
                                                             {"fp32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
                                                             {"fp16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}};

// A fixed batch and capacity for the graph's free ones, which a plan has and ONNX has not.
struct Graph {
  Ort::Env env{ORT_LOGGING_LEVEL_FATAL, "fake"};
  mutable Ort::Session session{nullptr};
  std::vector<EngineTensor> tensors;
  std::int64_t most;  // new tokens in one call
  bool captures_itself;
};

class FakeLane final : public Lane {
 public:
  explicit FakeLane(std::shared_ptr<const Graph> graph) : graph_(std::move(graph)) { ++counts.lanes; }
  ~FakeLane() override { EXPECT(pending_.empty()); }

  void enter() override { entered_ = true; }

  std::shared_ptr<std::byte> device_memory(std::size_t bytes) override { return allocate(device_, bytes, 0); }
  std::shared_ptr<std::byte> host_memory(std::size_t bytes) override { return allocate(host_, bytes, 0xFF); }

  void bind(const std::string& name, std::byte* memory) override {
    EXPECT(std::ranges::count(graph_->tensors, name, &EngineTensor::name) == 1);
    EXPECT(device_.contains(memory));
    bound_[name] = memory;
  }

  void set_shape(Profile profile, const std::string& name, std::span<const std::int64_t> shape) override {
    const std::int64_t most = profile == Profile::decode ? 1 : graph_->most;
    EXPECT(shape.size() == 2 && shape[0] == graph_->tensors[0].shape[0] && shape[1] >= 1 && shape[1] <= most);
    columns_[{profile, name}] = shape[1];
  }

  void copy(std::byte* to, const std::byte* from, std::size_t bytes) override {
    EXPECT(inside(device_, to, bytes) != inside(device_, from, bytes) &&
           inside(host_, to, bytes) != inside(host_, from, bytes));
    add([=] { std::memcpy(to, from, bytes); });
  }

  void run(Profile profile) override {
    if (capturing_) EXPECT(ran_);
    ran_ = true;
    add([this, profile] { compute(profile); });
  }

  void capture(const std::function<void()>& work) override {
    EXPECT(!graph_->captures_itself && captured_.empty());
    ++counts.captures;
    capturing_ = true;
    work();
    capturing_ = false;
    EXPECT(captured_.size() > 2);
  }

  void launch() override {
    EXPECT(!captured_.empty());
    ++counts.launches;
    pending_.insert(pending_.end(), captured_.begin(), captured_.end());
  }

  void wait() override {
    EXPECT(entered_);
    for (const auto& work : pending_) work();
    pending_.clear();
  }

 private:
  using Memory = std::map<const std::byte*, std::size_t>;

  std::shared_ptr<std::byte> allocate(Memory& kind, std::size_t bytes, int value) {
    ++counts.allocations;
    auto* memory = static_cast<std::byte*>(std::malloc(bytes));
    if (!memory) throw MemoryError("no GPU memory for " + std::to_string(bytes / 1000000) + " MB");
    std::memset(memory, value, bytes);
    kind[memory] = bytes;
    return {memory, [](std::byte* m) { std::free(m); }};
  }

  static bool inside(const Memory& kind, const std::byte* at, std::size_t bytes) {
    const auto next = kind.upper_bound(at);
    return next != kind.begin() && at + bytes <= std::prev(next)->first + std::prev(next)->second;
  }

  void add(std::function<void()> work) { (capturing_ ? captured_ : pending_).push_back(std::move(work)); }

  void compute(Profile profile) {
    ++counts.runs;
    const std::int64_t T = columns_.at({profile, graph_->tensors[0].name});
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    Ort::IoBinding binding(graph_->session);
    for (const EngineTensor& tensor : graph_->tensors) {
      std::byte* data = bound_.at(tensor.name);
      if (!tensor.alias.empty()) EXPECT(data == bound_.at(tensor.alias));
      std::vector<std::int64_t> shape = tensor.shape;
      std::size_t bytes = tensor.dtype == "int64" ? 8 : tensor.dtype == "fp32" ? 4 : 2;
      for (std::int64_t& size : shape) {
        if (size < 0) size = T;
        bytes *= static_cast<std::size_t>(size);
      }
      EXPECT(inside(device_, data, bytes));
      const auto value = Ort::Value::CreateTensor(memory, data, bytes, shape.data(), shape.size(), TYPES.at(tensor.dtype));
      tensor.input ? binding.BindInput(tensor.name.c_str(), value) : binding.BindOutput(tensor.name.c_str(), value);
    }
    graph_->session.Run(Ort::RunOptions(), binding);
  }

  std::shared_ptr<const Graph> graph_;
  Memory device_, host_;
  std::map<std::string, std::byte*> bound_;
  std::map<std::pair<Profile, std::string>, std::int64_t> columns_;
  std::vector<std::function<void()>> pending_, captured_;
  bool entered_ = false, capturing_ = false, ran_ = false;
};

class FakeEngine final : public Engine {
 public:
  explicit FakeEngine(std::shared_ptr<const Graph> graph) : graph_(std::move(graph)) {}
  std::vector<EngineTensor> tensors() const override { return graph_->tensors; }
  bool captures_itself() const override { return graph_->captures_itself; }
  std::unique_ptr<Lane> lane() const override { return std::make_unique<FakeLane>(graph_); }

 private:
  std::shared_ptr<const Graph> graph_;
};

// A plan is four words: batch, capacity, prefill and the graph's path.
class FakeGpu final : public Gpu {
 public:
  explicit FakeGpu(bool rtx) : rtx_(rtx) { start_onnxruntime(); }

  std::string version() const override { return "1.2.3.4"; }
  std::string name() const override { return "NVIDIA Fake"; }
  std::string chip() const override { return "sm89"; }

  std::shared_ptr<const Engine> load(std::span<const std::byte> plan, bool) const override {
    char path[4096] = {};
    long long batch = 0, capacity = 0, most = 0;
    const std::string text(reinterpret_cast<const char*>(plan.data()), plan.size());
    if (std::sscanf(text.c_str(), "%lld %lld %lld %4095s", &batch, &capacity, &most, path) != 4)
      throw BackendError("TensorRT cannot read it");
    auto graph = std::make_shared<Graph>();
    graph->most = most;
    graph->captures_itself = rtx_;
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    graph->session = Ort::Session(graph->env, path, options);
    const Ort::Session& session = graph->session;
    Ort::AllocatorWithDefaultOptions names;
    for (std::size_t i = 0; i < session.GetInputCount(); ++i)
      add(*graph, session.GetInputNameAllocated(i, names).get(), true, session.GetInputTypeInfo(i), batch, capacity);
    for (std::size_t i = 0; i < session.GetOutputCount(); ++i)
      add(*graph, session.GetOutputNameAllocated(i, names).get(), false, session.GetOutputTypeInfo(i), batch, capacity);
    return std::make_shared<FakeEngine>(graph);
  }

 private:
  static void add(Graph& graph, const std::string& name, bool input, const Ort::TypeInfo& info, std::int64_t batch,
                  std::int64_t capacity) {
    const auto tensor = info.GetTensorTypeAndShapeInfo();
    const auto type = std::ranges::find(TYPES, tensor.GetElementType(), [](const auto& entry) { return entry.second; });
    EngineTensor result{name, input, type->first, tensor.GetShape(), {}};
    result.shape[0] = batch;
    if (result.shape.size() == 4) result.shape[2] = capacity;
    if (name.starts_with("present")) result.alias = "past_key_values" + name.substr(7);
    graph.tensors.push_back(std::move(result));
  }

  bool rtx_;
};

}  // namespace

std::shared_ptr<const Gpu> tensorrt(const std::string& backend) { return std::make_shared<FakeGpu>(backend == "tensorrt-rtx"); }

}  // namespace headpool::detail

extern "C" HEADPOOL_API headpool::detail::Counts* fake_counts() { return &headpool::detail::counts; }
