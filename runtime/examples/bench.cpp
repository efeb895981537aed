// Measures a variant of a bundle and writes every sample, as JSON that `headpool compare` and `headpool report` read:
//
//     bench bundle g4.fused out.json 128,1024 [SAMPLES [THREADS [BATCH]]]
//     bench --backend tensorrt-rtx bundle g4.attention out.json 128,1024
//
// As `headpool profile` does: random tokens, decode steps one after another at a fixed context, prefill into an empty cache.
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <headpool/generate.hpp>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr int WARMUP = 8, BURST = 8, PREFILLS = 6;  // untimed steps; neighbours that intervals draw together; runs

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The first value of `key` in /proc/cpuinfo; empty where there is none.
std::string cpu_info(const std::string& key) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const auto colon = line.find(':');
    if (colon != std::string::npos && line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1) == key)
      return colon + 2 <= line.size() ? line.substr(colon + 2) : "";
  }
  return "";
}

Json machine(const headpool::Model& model) {
  utsname os{};
  uname(&os);
  double load = 0;
  if (getloadavg(&load, 1) != 1) load = 0;
  std::istringstream words(cpu_info("flags") + cpu_info("Features"));
  Json flags = Json::array();
  for (std::string flag; words >> flag;)  // those that decide the speed of a matrix product
    if (flag.starts_with("avx") || flag.starts_with("amx") || flag == "fma" || flag == "f16c" || flag.starts_with("sve") ||
        flag.starts_with("asimd"))
      flags.push_back(flag);
  const long cpus = sysconf(_SC_NPROCESSORS_ONLN);
  const bool gpu = model.backend().name.starts_with("tensorrt");  // it names its GPU, and uses no threads of the CPU
  return {{"cpu", cpu_info("model name")},
          {"cores", gpu ? cpus : model.threads()},
          {"cpus", cpus},
          {"memory_bytes", sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGE_SIZE)},
          {"l3_bytes", std::max(0L, sysconf(_SC_LEVEL3_CACHE_SIZE))},
          {"flags", flags},
          {"os", std::string(os.sysname) + "-" + os.release + "-" + os.machine},
          {"gpus", gpu ? Json{model.backend().provider} : Json::array()},
          {"load", load}};
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
              {"dtype", info.dtype},
              {"weight_bytes", info.weight_bytes},
              {"kv_bytes_per_token", info.kv_bytes_per_token}};
  for (const Json& variant : manifest["variants"])
    if (variant["name"] == info.variant) result["conversion"] = variant.value("conversion", Json());
  return result;
}

struct Samples {
  std::vector<double> decode, prefill, ttft;
};

Samples measure(headpool::Session& session, std::int64_t context, int samples) {
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
  for (int i = -WARMUP; i < samples; ++i) {
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

void run(const std::string& bundle, const headpool::ModelOptions& how, const std::string& out,
         const std::vector<std::int64_t>& contexts, int samples, std::int64_t batch) {
  if (std::filesystem::exists(out)) throw headpool::ArgumentError(out + " exists; name another file");
  const headpool::Model model = headpool::Model::open(bundle, how);
  const headpool::BackendInfo& backend = model.backend();
  Json result{{"schema", 1}, {"created", now()}, {"machine", machine(model)}, {"cells", Json::array()}};
  result["versions"] = {{"headpool", HEADPOOL_VERSION}, {backend.library, backend.version}};
  result["settings"] = {{"contexts", contexts}, {"batches", {batch}}, {"samples", samples}, {"warmup", WARMUP}};
  Json settings{{"threads", model.threads()}};
  if (backend.library == "onnxruntime") settings["optimisation"] = "all";
  for (const std::int64_t context : contexts) {
    headpool::SessionOptions options;
    options.batch = batch, options.capacity = (context + 8) / 8 * 8;
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
    std::printf("%6lld tokens  decode p50 %.3f ms  p90 %.3f  p99 %.3f  min %.3f\n", static_cast<long long>(context),
                percentile(50), percentile(90), percentile(99), percentile(0));
  }
  const std::string unfinished = out + ".unfinished";
  std::ofstream(unfinished) << result.dump(1) << '\n';
  std::filesystem::rename(unfinished, out);
}

}  // namespace

int main(int argc, char** argv) {
  headpool::ModelOptions how;
  if (argc > 2 && std::string(argv[1]) == "--backend") how.backend = argv[2], argv += 2, argc -= 2;
  if (argc < 5) {
    std::fputs("usage: bench [--backend NAME] BUNDLE VARIANT OUT.json CONTEXT,… [SAMPLES [THREADS [BATCH]]]\n", stderr);
    return 2;
  }
  const auto number = [&](int index, long otherwise) { return argc > index ? std::atol(argv[index]) : otherwise; };
  try {
    std::vector<std::int64_t> contexts;
    std::istringstream words(argv[4]);
    for (std::string word; std::getline(words, word, ',');) contexts.push_back(std::atoll(word.c_str()));
    if (contexts.empty() || *std::min_element(contexts.begin(), contexts.end()) < 1 || number(5, 104) < 1)
      throw headpool::ArgumentError("contexts and samples are whole numbers from 1");
    how.variant = argv[2], how.threads = static_cast<int>(number(6, 0));
    run(argv[1], how, argv[3], contexts, static_cast<int>(number(5, 104)), number(7, 1));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench: %s\n", error.what());
    return 2;
  }
}
