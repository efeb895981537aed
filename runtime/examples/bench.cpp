// Measures a variant of a bundle and writes every sample, as JSON that `headpool compare` and `headpool report` read:
//
//     bench bundle g4.fused out.json 128,1024 [SAMPLES [THREADS [BATCH]]]
//     bench --backend tensorrt-rtx bundle g4.attention out.json 128,1024
//
// As `headpool profile` does: random tokens, decode steps one after another at a fixed context, prefill into an empty cache.
#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <headpool/generate.hpp>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <sstream>

#include "arguments.hpp"
#include "machine.hpp"
#include "output.hpp"

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr const char* USAGE = "bench [--backend NAME] BUNDLE VARIANT OUT.json CONTEXT,… [SAMPLES [THREADS [BATCH]]]";
constexpr int WARMUP = 8, BURST = 8, PREFILLS = 6;  // untimed steps; neighbours that intervals draw together; runs

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

Json gpus_of(const headpool::BackendInfo& backend) {
  const bool gpu = backend.name.starts_with("tensorrt") || backend.name == "onnxruntime-cuda";
  return gpu ? Json{backend.provider} : Json::array();
}

// Of attention in a step for each token of context: a product and a sum for each channel of every query head's K and V.
std::int64_t attention_operations(const headpool::ModelInfo& info) {
  const auto kv_heads = std::accumulate(info.kv_heads.begin(), info.kv_heads.end(), std::int64_t{0});
  const std::string& cache = info.cache_dtype.empty() ? info.dtype : info.cache_dtype;
  const auto bytes = static_cast<std::int64_t>(info.kv_bytes_per_token) / kv_heads;
  const auto channels = cache == "int8" ? bytes - 8 : bytes / (cache == "fp32" ? 4 : 2);  // int8 rows have 4 of a scale each
  return 2 * static_cast<std::int64_t>(info.kv_heads.size()) * info.heads * channels;
}

// What a figure names of the variant, from the bundle's own manifest.
Json subject(const std::string& bundle, const headpool::ModelInfo& info) {
  std::ifstream file(bundle + "/headpool.json");
  const Json manifest = Json::parse(file);
  const auto& heads = info.kv_heads;
  const bool equal = std::equal(heads.begin() + 1, heads.end(), heads.begin());
  const std::string folder = std::filesystem::canonical(bundle).filename();
  Json result{{"model", manifest.value("source", Json::object()).value("name", folder)},
              {"bundle", folder},
              {"bundle_hash", ""},
              {"variant", info.variant},
              {"groups", equal ? Json(heads[0]) : Json(heads)},
              {"heads", info.heads},
              {"pattern", info.pattern},
              {"cache", info.cache},
              {"dtype", info.dtype + (info.quantize.empty() ? "" : ", " + info.quantize + " weights") +
                            (info.cache_dtype.empty() ? "" : ", " + info.cache_dtype + " cache")},
              {"weight_bytes", info.weight_bytes},
              {"kv_bytes_per_token", info.kv_bytes_per_token},
              {"encoder", info.encoder_layers > 0},
              {"attention_operations", attention_operations(info)}};
  for (const Json& variant : manifest["variants"]) {
    if (variant["name"] != info.variant) continue;
    result["conversion"] = variant.value("conversion", Json());
    const Json rounding = variant.value("rounding", Json());
    if (rounding.is_object() && rounding.value("method", "") == "gptq")
      result["dtype"] = result["dtype"].get<std::string>() + " by GPTQ";
  }
  return result;
}

struct Samples {
  std::vector<double> decode, prefill, ttft;
};

Samples measure(headpool::Session& session, std::int64_t context, std::int64_t samples) {
  std::mt19937_64 random(0);
  std::uniform_int_distribution<headpool::Token> token(0, session.model().info().vocab_size - 1);
  const auto batch = static_cast<std::size_t>(session.batch());
  std::vector<std::vector<headpool::Token>> tokens(batch, std::vector<headpool::Token>(static_cast<std::size_t>(context)));
  std::vector<std::span<const headpool::Token>> prompts;
  std::vector<headpool::Token> next(batch);
  for (auto& row : tokens) {
    for (auto& id : row) id = token(random);
    prompts.emplace_back(row);
  }
  for (auto& id : next) id = token(random);

  headpool::Sampler sampler({}, session.batch());
  Samples taken;
  for (int i = 0; i <= PREFILLS; ++i) {  // the first one is not timed
    session.reset();
    const auto start = Clock::now();
    const auto logits = session.prefill(prompts);
    const double filled = seconds_since(start);
    sampler.pick(logits);
    if (!i) continue;
    taken.prefill.push_back(filled);
    taken.ttft.push_back(seconds_since(start));
  }
  for (std::int64_t i = -WARMUP; i < samples; ++i) {
    const auto start = Clock::now();
    session.decode(next);
    const double time = seconds_since(start);
    session.rewind(context);
    if (i >= 0) taken.decode.push_back(time);
  }
  return taken;
}

std::string now() {
  const std::time_t time = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&time));
  return text;
}

std::vector<std::int64_t> read_contexts(const std::string& list) {
  std::vector<std::int64_t> contexts;
  std::istringstream words(list + ",");
  for (std::string word; std::getline(words, word, ',');) {
    contexts.push_back(number("CONTEXT", word, 1, INT32_MAX));
    if (std::count(contexts.begin(), contexts.end(), contexts.back()) > 1)
      throw headpool::ArgumentError("CONTEXT " + word + " is given twice");
  }
  return contexts;
}

headpool::SessionOptions room_for(std::int64_t context, std::int64_t batch) {
  headpool::SessionOptions options;
  options.batch = batch, options.capacity = (context + 8) / 8 * 8;
  return options;
}

// What cannot be measured is refused before anything is.
void check_longest(const headpool::Model& model, std::int64_t context, std::int64_t batch) {
  const std::int64_t limit = model.info().max_positions;
  if (context >= limit)
    throw headpool::ArgumentError("a context of " + std::to_string(context) + " tokens and the one decoded after it is more " +
                                  "than the model's " + std::to_string(limit) + "; choose contexts up to " +
                                  std::to_string(limit - 1));
  headpool::Session(model, room_for(context, batch));
}

void run(const std::string& bundle, const headpool::ModelOptions& how, const std::string& out,
         const std::vector<std::int64_t>& contexts, std::int64_t samples, std::int64_t batch) {
  const Output output(out);
  const headpool::Model model = headpool::Model::open(bundle, how);
  check_longest(model, *std::max_element(contexts.begin(), contexts.end()), batch);
  const headpool::BackendInfo& backend = model.backend();
  Json result{{"schema", 1}, {"created", now()}, {"machine", machine::record(gpus_of(backend))}, {"cells", Json::array()}};
  result["versions"] = {{"headpool", HEADPOOL_VERSION}, {backend.library, backend.version}};
  result["settings"] = {{"contexts", contexts}, {"batches", {batch}}, {"samples", samples}, {"warmup", WARMUP}};
  Json settings{{"threads", model.threads()}};
  if (backend.library == "onnxruntime") settings["optimisation"] = "all";
  for (const std::int64_t context : contexts) {
    const headpool::SessionOptions options = room_for(context, batch);
    headpool::Session session(model, options);
    settings["chunk"] = options.chunk;
    const Samples taken = measure(session, context, samples);
    for (const auto& [kind, values] : {std::pair("decode", taken.decode), {"prefill", taken.prefill}, {"ttft", taken.ttft}})
      result["cells"].push_back({{"subject", subject(bundle, model.info())},
                                 {"kind", kind},
                                 {"batch", batch},
                                 {"context", context},
                                 {"capacity", session.capacity()},
                                 {"backend", "headpool::runtime " + backend.name},
                                 {"provider", backend.provider},
                                 {"versions", {{backend.library, backend.version}}},
                                 {"options", settings},
                                 {"samples", values},
                                 {"burst", kind == std::string("decode") ? BURST : 1}});
    std::vector<double> sorted = taken.decode;
    std::sort(sorted.begin(), sorted.end());
    const auto percentile = [&](std::size_t p) { return 1e3 * sorted[(sorted.size() - 1) * p / 100]; };
    const bool tail = sorted.size() >= 100;  // fewer samples have no 99th percentile to speak of
    std::printf("%6lld tokens  decode p50 %.3f ms  p90 %.3f  %s %.3f  min %.3f\n", static_cast<long long>(context),
                percentile(50), percentile(90), tail ? "p99" : "max", percentile(tail ? 99 : 100), percentile(0));
  }
  output.write(result.dump(1) + "\n");
}

}  // namespace

int main(int argc, char** argv) {
  return run_example("bench", USAGE, argc, argv, [](Words words) {
    headpool::ModelOptions how;
    how.backend = take_backend(words, USAGE);
    expect_count(words, 4, 7, USAGE);
    const auto optional = [&](std::size_t index, const char* what, std::int64_t least, std::int64_t most,
                              std::int64_t otherwise) {
      return words.size() > index ? number(what, words[index], least, most) : otherwise;
    };
    const std::vector<std::int64_t> contexts = read_contexts(words[3]);
    const std::int64_t samples = optional(4, "SAMPLES", 1, 1000000, 104);
    how.variant = words[1], how.threads = static_cast<int>(optional(5, "THREADS", 0, 1024, 0));
    run(words[0], how, words[2], contexts, samples, optional(6, "BATCH", 1, 65536, 1));
  });
}
