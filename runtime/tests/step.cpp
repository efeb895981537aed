// What a decode step costs beside ONNX Runtime's own Run: step BUNDLE VARIANT, of a pattern other than fused and a static
// cache.
//
// Prints JSON: microseconds of a step and of Run alone (medians), and how often each of them allocated with operator new.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <headpool/session.hpp>
#include <new>
#include <nlohmann/json.hpp>

namespace {

std::atomic<long> allocations{0};

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size ? size : 1)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

constexpr int STEPS = 3000;
constexpr std::int64_t ROWS = 64;

// ONNX Runtime as anyone would drive it: one binding, static caches as input and output.
class Raw {
 public:
  explicit Raw(const std::string& bundle, const std::string& variant) {
    std::ifstream file(bundle + "/headpool.json");
    const auto manifest = nlohmann::json::parse(file);
    for (const auto& item : manifest["variants"]) {
      if (item["name"] != variant) continue;
      options_.SetIntraOpNumThreads(1);
      session_ = Ort::Session(env_, (bundle + "/" + item["graph"].get<std::string>()).c_str(), options_);
      binding_ = Ort::IoBinding(session_);
      for (const auto& value : item["inputs"]) bind(value, true);
      for (const auto& value : item["outputs"]) bind(value, false);
    }
  }

  void step(std::int64_t position) {
    buffers_["position_ids"][0] = position;
    session_.Run(run_, binding_);
  }

 private:
  void bind(const nlohmann::json& value, bool input) {
    const std::string name = value["name"], memory = value.value("alias", name);
    std::vector<std::int64_t> shape;
    std::size_t count = 1;
    for (const auto& n : value["shape"]) {
      shape.push_back(n.is_number() ? n.get<std::int64_t>() : n == "capacity" ? ROWS : 1);
      count *= static_cast<std::size_t>(shape.back());
    }
    auto& buffer = buffers_[memory];
    buffer.resize(count);
    const bool whole = value["dtype"] == "int64";
    const auto tensor =
        Ort::Value::CreateTensor(info_, buffer.data(), count * (whole ? 8 : 4), shape.data(), shape.size(),
                                 whole ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    input ? binding_.BindInput(name.c_str(), tensor) : binding_.BindOutput(name.c_str(), tensor);
  }

  Ort::Env env_{ORT_LOGGING_LEVEL_FATAL};
  Ort::SessionOptions options_;
  Ort::Session session_{nullptr};
  Ort::RunOptions run_;
  Ort::MemoryInfo info_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::map<std::string, std::vector<std::int64_t>> buffers_;
  Ort::IoBinding binding_{nullptr};
};

struct Cost {
  std::vector<double> times;
  long allocated = 0;

  template <class Step>
  void add(const Step& step) {
    const long before = allocations;
    const auto start = std::chrono::steady_clock::now();
    step();
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    allocated += allocations - before;
    times.push_back(time.count());
  }

  double median() {
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Raw raw(argv[1], argv[2]);
  headpool::Session session(headpool::Model::open(argv[1], {argv[2], 1}));
  // By decoding, as above: ONNX Runtime plans memory for the shapes it sees first, and a prefill of several tokens has others.
  if (session.model().info().encoder_layers) session.prefill(std::vector<headpool::Token>{1});  // of one token, as above
  for (int i = 0; i < 8; ++i) session.decode(1);
  Cost alone, whole;
  for (int i = 0; i < STEPS; ++i) {
    const std::int64_t position = 8 + i % 50;
    if (position == 8) session.rewind(8);
    if (i < 100) {  // untimed
      raw.step(position);
      session.decode(1);
      continue;
    }
    alone.add([&] { raw.step(position); });
    whole.add([&] { session.decode(1); });
  }
  const long steps = static_cast<long>(whole.times.size());
  std::printf("{\"steps\": %ld, \"run_us\": %.2f, \"step_us\": %.2f, \"run_allocations\": %ld, \"step_allocations\": %ld}\n",
              steps, alone.median(), whole.median(), alone.allocated, whole.allocated);
}
