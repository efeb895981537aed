// What a decode step costs beside ONNX Runtime's own Run: step BUNDLE VARIANT [BATCH [THREADS]]
//
// Prints JSON, times in microseconds:
//   of a static cache that does not grow: step_us and run_us, medians of a step and of Run alone, in turns, over bindings that
//     nothing else touches; beside_us, the median of a step without the Run within it; how often each allocated with operator
//     new
//   grown: steps one after another while the cache grows from 64 tokens to 1,100: the mean and the largest without the Run
//     within them, the median and the largest of whole steps, and how often an input was bound
//   chosen: the same with a capacity of 1,100 that the caller chose
//   own_allocations: how often this library allocated, by any means, while tokens were decoded
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <headpool/session.hpp>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

#include "allocations.hpp"
#include "inside_run.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using Microseconds = std::chrono::duration<double, std::micro>;

constexpr int STEPS = 3000, UNTIMED = 100;
constexpr std::chrono::seconds LONGEST{5};  // of a large model, fewer than STEPS
constexpr std::int64_t ROWS = 64, GROWN = 1100;

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
  Raw(const std::string& bundle, const std::string& variant, std::int64_t batch, int threads) : batch_(batch) {
    std::ifstream file(bundle + "/headpool.json");
    const auto manifest = nlohmann::json::parse(file);
    for (const auto& item : manifest["variants"]) {
      if (item["name"] != variant) continue;
      options_.SetIntraOpNumThreads(threads);
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

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

struct Cost {
  std::vector<double> times, beside;  // whole, and without ONNX Runtime's Run
  long allocated = 0;

  template <class Step>
  void add(const Step& step) {
    const long before = allocations::all;
    const auto inside = inside_run::spent;
    const auto start = Clock::now();
    step();
    const Microseconds time = Clock::now() - start;
    allocated += allocations::all - before;
    times.push_back(time.count());
    beside.push_back((time - Microseconds(inside_run::spent - inside)).count());
  }
};

// A session that has decoded 8 tokens a sequence.
//
// Decoded, as Raw does: ONNX Runtime plans memory for the shapes it sees first, and a prefill of several tokens has others.
headpool::Session begun(const headpool::Model& model, const std::vector<headpool::Token>& tokens, std::int64_t capacity = 0) {
  headpool::SessionOptions sizes;
  sizes.batch = static_cast<std::int64_t>(tokens.size()), sizes.capacity = capacity;
  headpool::Session session(model, sizes);
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

// A step in turns with Run alone, of a cache that does not grow.
nlohmann::json steady(headpool::Session session, Raw raw, const std::vector<headpool::Token>& tokens) {
  Cost alone, whole;
  Clock::time_point end;
  for (int i = 0; i < STEPS && (i <= UNTIMED || Clock::now() < end); ++i) {
    const std::int64_t position = 8 + i % 50;
    if (position == 8) session.rewind(8);
    if (i < UNTIMED) {
      raw.step(position);
      session.decode(tokens);
      end = Clock::now() + LONGEST;
      continue;
    }
    alone.add([&] { raw.step(position); });
    whole.add([&] { session.decode(tokens); });
  }
  return {{"steps", whole.times.size()},       {"run_us", median(alone.times)},      {"step_us", median(whole.times)},
          {"beside_us", median(whole.beside)}, {"run_allocations", alone.allocated}, {"step_allocations", whole.allocated}};
}

// Steps one after another from ROWS tokens a sequence to GROWN, or as many as the model takes.
nlohmann::json growing(headpool::Session session, const std::vector<headpool::Token>& tokens) {
  const std::int64_t last = std::min(GROWN, session.capacity()), first = std::min(ROWS, last - 1);
  while (session.lengths()[0] < first) session.decode(tokens);
  Cost cost;
  const long bound = inside_run::bound;
  while (session.lengths()[0] < last) cost.add([&] { session.decode(tokens); });
  const auto largest = std::max_element(cost.beside.begin(), cost.beside.end());
  return {{"from", first},
          {"to", last},
          {"bound", inside_run::bound - bound},
          {"beside_mean_us", std::accumulate(cost.beside.begin(), cost.beside.end(), 0.0) / static_cast<double>(last - first)},
          {"beside_largest_us", *largest},
          {"largest_at", first + (largest - cost.beside.begin())},  // tokens in the cache before it
          {"step_us", median(cost.times)},
          {"step_largest_us", *std::max_element(cost.times.begin(), cost.times.end())}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) return 2;
  const std::vector<headpool::Token> tokens(argc > 3 ? std::strtoul(argv[3], nullptr, 10) : 1, 1);
  const int threads = argc > 4 ? std::atoi(argv[4]) : 1;
  const auto batch = static_cast<std::int64_t>(tokens.size());
  const auto model = headpool::Model::open(argv[1], {argv[2], threads});
  nlohmann::json found;
  if (model.info().cache == "static") found = steady(begun(model, tokens), Raw(argv[1], argv[2], batch, threads), tokens);
  found["grown"] = growing(begun(model, tokens), tokens);
  found["chosen"] = growing(begun(model, tokens, GROWN), tokens);
  found["own_allocations"] = own(begun(model, tokens), tokens);
  if (inside_run::spent.count() == 0) throw std::logic_error("no Run was seen");
  std::printf("%s\n", found.dump().c_str());
}
