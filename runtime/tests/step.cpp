// What a decode step costs beside ONNX Runtime's own Run: step BUNDLE VARIANT [BATCH]
//
// Prints JSON: microseconds of a step and of Run alone (medians), how often each of them allocated with operator new, and how
// often this library did so, by any means, while tokens were decoded. Of a concat cache, whose binding changes with each step,
// only the last.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <headpool/session.hpp>
#include <map>
#include <nlohmann/json.hpp>

#include "allocations.hpp"

namespace {

constexpr int STEPS = 3000;
constexpr std::int64_t ROWS = 64;

// What a binding's dtype is called, and its bytes.
const std::map<std::string, std::pair<ONNXTensorElementDataType, std::size_t>> TYPES{
    {"int64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8}},
    {"fp32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4}},
    {"fp16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2}},
    {"int8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1}},
};

// ONNX Runtime as anyone would drive it: one binding, static caches as input and output.
class Raw {
 public:
  Raw(const std::string& bundle, const std::string& variant, std::int64_t batch) : batch_(batch) {
    std::ifstream file(bundle + "/headpool.json");
    const auto manifest = nlohmann::json::parse(file);
    for (const auto& item : manifest["variants"]) {
      if (item["name"] != variant) continue;
      options_.SetIntraOpNumThreads(1);
      if (item["pattern"] == "fused") options_.RegisterCustomOpsLibrary(HEADPOOL_OPS);
      session_ = Ort::Session(env_, (bundle + "/" + item["graph"].get<std::string>()).c_str(), options_);
      binding_ = Ort::IoBinding(session_);
      for (const auto& value : item["inputs"]) bind(value, true);
      for (const auto& value : item["outputs"]) bind(value, false);
    }
  }

  void step(std::int64_t position) {
    std::fill_n(buffers_["position_ids"].begin(), batch_, position);
    session_.Run(run_, binding_);
  }

 private:
  void bind(const nlohmann::json& value, bool input) {
    const std::string name = value["name"], memory = value.value("alias", name);
    std::vector<std::int64_t> shape;
    std::size_t count = 1;
    for (const auto& n : value["shape"]) {
      shape.push_back(n.is_number() ? n.get<std::int64_t>() : n == "capacity" ? ROWS : n == "batch" ? batch_ : 1);
      count *= static_cast<std::size_t>(shape.back());
    }
    auto& buffer = buffers_[memory];
    buffer.resize(count);
    const auto [type, bytes] = TYPES.at(value["dtype"]);
    const auto tensor = Ort::Value::CreateTensor(info_, buffer.data(), count * bytes, shape.data(), shape.size(), type);
    input ? binding_.BindInput(name.c_str(), tensor) : binding_.BindOutput(name.c_str(), tensor);
  }

  std::int64_t batch_;
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
    const long before = allocations::all;
    const auto start = std::chrono::steady_clock::now();
    step();
    const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
    allocated += allocations::all - before;
    times.push_back(time.count());
  }

  double median() {
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }
};

// A session of its own model that has decoded 8 tokens a sequence.
//
// Decoded, as Raw does: ONNX Runtime plans memory for the shapes it sees first, and a prefill of several tokens has others.
headpool::Session begun(char** argv, const std::vector<headpool::Token>& tokens) {
  headpool::SessionOptions sizes;
  sizes.batch = static_cast<std::int64_t>(tokens.size());
  headpool::Session session(headpool::Model::open(argv[1], {argv[2], 1}), sizes);
  const std::vector<std::span<const headpool::Token>> sources(tokens.size(), std::span(tokens).first(1));
  if (session.model().info().encoder_layers) session.prefill(sources);  // of one token, as Raw's
  for (int i = 0; i < 8; ++i) session.decode(tokens);
  return session;
}

// Allocations of this library while the cache fills and grows to 120 tokens a sequence.
long own(headpool::Session session, const std::vector<headpool::Token>& tokens) {
  allocations::attributing = true;
  while (session.lengths()[0] < 120) session.decode(tokens);
  allocations::attributing = false;
  return allocations::of_headpool;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) return 2;
  const std::vector<headpool::Token> tokens(argc == 4 ? std::strtoul(argv[3], nullptr, 10) : 1, 1);
  nlohmann::json found;
  headpool::Session session = begun(argv, tokens);
  if (session.model().info().cache == "static") {
    Raw raw(argv[1], argv[2], session.batch());
    Cost alone, whole;
    for (int i = 0; i < STEPS; ++i) {
      const std::int64_t position = 8 + i % 50;
      if (position == 8) session.rewind(8);
      if (i < 100) {  // untimed
        raw.step(position);
        session.decode(tokens);
        continue;
      }
      alone.add([&] { raw.step(position); });
      whole.add([&] { session.decode(tokens); });
    }
    found = {{"steps", whole.times.size()},
             {"run_us", alone.median()},
             {"step_us", whole.median()},
             {"run_allocations", alone.allocated},
             {"step_allocations", whole.allocated}};
  }
  found["own_allocations"] = own(begun(argv, tokens), tokens);
  std::printf("%s\n", found.dump().c_str());
}
