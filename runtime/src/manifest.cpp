#include "manifest.hpp"

#include <set>

#include "bindings.hpp"

namespace headpool::detail {
namespace {

constexpr std::int64_t SCHEMA = 1;
const auto FORMS = {"int8", "int8-zp", "int8-128", "int8-128-zp", "int4", "int4-zp", "int4-128", "int4-128-zp"};

std::uint64_t kv_bytes_per_token(const Variant& variant) {
  std::uint64_t sum = 0;
  for (const CacheBinding& cache : variant.caches) {
    const auto values = static_cast<std::uint64_t>(cache.heads) * static_cast<std::uint64_t>(cache.size);  // < 2⁶²
    if (values > (std::uint64_t{1} << 40)) flaw("cache " + shown(cache.past) + " is too large");
    sum += values * item_bytes(cache.type);
    if (sum > (std::uint64_t{1} << 44)) flaw("its caches are too large");
  }
  return sum;
}

void read_config(const Json& config, Variant& variant) {
  ModelInfo& info = variant.info;
  info.vocab_size = size_in(config, "vocab_size");
  info.max_positions = size_in(config, "max_positions");
  info.heads = size_in(config, "num_heads");
  const std::int64_t layers = size_in(config, "num_layers");
  for (const Json& heads : array(config, "kv_heads")) info.kv_heads.push_back(number(heads, "a number of KV heads", 1, MOST));
  if (static_cast<std::int64_t>(info.kv_heads.size()) != layers)
    flaw("kv_heads names " + std::to_string(info.kv_heads.size()) + " layers, the model has " + std::to_string(layers));
  for (const Json& id : array(config, "eos_token_ids")) info.stop_ids.push_back(number(id, "a token id", 0, INT64_MAX));
  if (!variant.encoder) return;
  info.encoder_layers = size_in(config, "encoder_layers");
  variant.encoder->hidden_size = size_in(config, "hidden_size");
  variant.encoder->start = number(at(config, "decoder_start_id"), "decoder_start_id", 0, info.vocab_size - 1);
}

Variant read_variant(const Json& data) {
  Variant variant{};
  ModelInfo& info = variant.info;
  info.variant = text(data, "name");
  if (info.variant.empty()) flaw("a variant has no name");
  info.pattern = text(data, "pattern");
  if (data.contains("encoder") && !data["encoder"].is_null()) {
    variant.encoder.emplace().graph = file_name(data["encoder"]);
  }
  info.cache = one_of(data, "cache", {"static", "concat"});
  info.dtype = one_of(data, "dtype", {"fp32", "fp16", "bf16"});
  if (data.contains("quantize") && !data["quantize"].is_null()) info.quantize = one_of(data, "quantize", FORMS);
  if (data.contains("cache_dtype") && !data["cache_dtype"].is_null()) {
    info.cache_dtype = one_of(data, "cache_dtype", {"fp16", "int8"});
    if (info.pattern != "fused" || info.cache != "static") flaw("a cache_dtype is for pattern fused, static");
  }
  variant.in_place = info.cache == "static";
  variant.dtype = data_type(info.dtype);
  variant.all_logits = one_of(data, "logits", {"last", "all"}) == "all";
  variant.graph = file_name(at(data, "graph"));
  for (const Json& name : array(data, "weights")) variant.weights.push_back(file_name(name));
  info.weight_bytes = static_cast<std::uint64_t>(number(at(data, "weight_bytes"), "weight_bytes", 0, INT64_MAX));
  read_config(at(data, "config"), variant);
  read_bindings(data, variant);
  info.kv_bytes_per_token = kv_bytes_per_token(variant);
  const Json& written = at(data, "kv_bytes_per_token");
  if (static_cast<std::uint64_t>(number(written, "kv_bytes_per_token", 0, INT64_MAX)) != info.kv_bytes_per_token)
    flaw("kv_bytes_per_token is " + shown(written) + ", its caches have " + std::to_string(info.kv_bytes_per_token));
  return variant;
}

}  // namespace

std::vector<Variant> parse_manifest(std::string_view text) try {
  const Json data = parse_json(text);
  const Json* schema = data.is_object() && data.contains("schema") ? &data["schema"] : nullptr;
  if (!schema || *schema != SCHEMA)
    throw BundleError("headpool.json has schema " + (schema ? shown(*schema) : std::string("none")) +
                      ", this headpool reads schema " + std::to_string(SCHEMA) + "; export it again");
  std::vector<Variant> variants;
  std::set<std::string> names;
  for (const Json& item : array(data, "variants")) {
    variants.push_back(read_variant(item));
    if (!names.insert(variants.back().info.variant).second) flaw("two variants have one name");
  }
  if (variants.empty()) flaw("it has no variants");
  return variants;
} catch (const Flaw& error) {
  throw BundleError(std::string("headpool.json is damaged: ") + error.what() + "; export the bundle again");
}

std::vector<Variant> read_manifest(const std::filesystem::path& bundle) {
  std::error_code failed;
  const std::filesystem::path path = bundle / "headpool.json";
  if (!std::filesystem::is_regular_file(path, failed)) {
    const bool folder = std::filesystem::is_directory(bundle, failed), exists = std::filesystem::exists(bundle, failed);
    const char* lack = folder ? "has no headpool.json" : exists ? "is a file" : "does not exist";
    throw BundleError((bundle.empty() ? "\"\"" : bundle.string()) + " is not a bundle: it " + lack +
                      "; make one with 'headpool export'");
  }
  return parse_manifest(read_text(path));
}

std::filesystem::path file_in(const std::filesystem::path& bundle, const std::string& name, const char* remedy) {
  const auto fail = [&](const std::string& what) { throw BundleError(bundle.string() + what + "; " + remedy); };
  if (!is_file_name(name)) fail(": " + shown(name) + " is not a file name in its own folder");
  std::error_code failed;
  const std::filesystem::path path = bundle / name;
  if (!std::filesystem::exists(path, failed)) fail(" lacks " + shown(name));
  if (!std::filesystem::is_regular_file(path, failed)) fail(": " + shown(name) + " is no regular file");
  const auto real = std::filesystem::canonical(path, failed);
  const auto folder = failed ? std::filesystem::path() : std::filesystem::canonical(bundle, failed);
  if (failed || real.parent_path() != folder) fail(": " + shown(name) + " is a link that leaves its folder");
  return path;
}

}  // namespace headpool::detail
