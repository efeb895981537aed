#include "record.hpp"

#include <algorithm>
#include <cstdlib>
#include <map>

#include "../fields.hpp"
#include "../guard.hpp"

namespace headpool::detail {
namespace {

constexpr std::int64_t SCHEMA = 1, MOST_SEQUENCES = 65536;

std::string text_or_null(const Json& object, const char* key) {
  return at(object, key).is_null() ? std::string() : text(object, key);
}

EngineTensor read_tensor(const Json& data) {
  EngineTensor tensor{text(data, "name"), one_of(data, "mode", {"input", "output"}) == "input", text(data, "dtype"), {}, {}};
  for (const Json& size : array(data, "shape")) tensor.shape.push_back(number(size, "a size", -1, MOST));
  tensor.alias = text_or_null(data, "alias");
  return tensor;
}

void expect_profile(const Json& profile, const char* name, std::int64_t most) {
  if (text(profile, "name") != name || at(profile, "least") != 1 || at(profile, "most") != most)
    flaw("profile " + shown(profile) + " is not " + name + " of 1 to " + std::to_string(most) + " tokens");
}

EngineRecord read_record(const Json& data) {
  EngineRecord record{};
  record.variant = text(data, "variant");
  record.file = file_name(at(data, "file"));
  record.sha256 = text(data, "sha256");
  record.bytes = static_cast<std::uint64_t>(number(at(data, "bytes"), "bytes", 1, INT64_MAX));
  const Json& recipe = at(data, "recipe");
  record.backend = one_of(recipe, "backend", {"tensorrt", "tensorrt-rtx"});
  const std::string module = record.backend == "tensorrt" ? "tensorrt" : "tensorrt_rtx";
  if (text(recipe, "module") != module) flaw("module is " + shown(at(recipe, "module")) + ", not " + module);
  record.version = text(recipe, "version");
  for (const Json& target : array(recipe, "targets")) {
    if (!target.is_string()) flaw("a target is " + shown(target) + ", not a text");
    record.targets.push_back(target.get<std::string>());
  }
  for (const Json& what : array(recipe, "compatible")) {
    if (what == "version")
      record.later_versions = true;
    else if (what == "hardware")
      record.later_chips = true;
    else
      flaw("compatible is " + shown(what) + ", neither version nor hardware");
  }
  record.batch = number(at(recipe, "batch"), "batch", 1, MOST_SEQUENCES);
  record.capacity = size_in(recipe, "capacity");
  record.prefill = number(at(recipe, "prefill"), "prefill", 1, record.capacity);
  const Json& strip = at(recipe, "strip");
  if (!strip.is_boolean()) flaw("strip is " + shown(strip) + ", neither true nor false");
  record.stripped = strip.get<bool>();
  record.quantize = text_or_null(recipe, "quantize");
  const Json& profiles = array(data, "profiles");
  if (profiles.size() != 2) flaw("an engine has " + std::to_string(profiles.size()) + " profiles, not 2");
  expect_profile(profiles[0], "prefill", record.prefill);
  expect_profile(profiles[1], "decode", 1);
  for (const Json& binding : array(data, "bindings")) record.tensors.push_back(read_tensor(binding));
  return record;
}

// "11.3.1.5" → {11, 3, 1, 5}; what is no number counts as 0.
std::vector<int> numbers(const std::string& version) {
  std::vector<int> found;
  for (std::size_t at = 0; at <= version.size(); at = std::min(version.find('.', at), version.size()) + 1)
    found.push_back(std::atoi(version.c_str() + at));
  return found;
}

std::vector<EngineTensor> tensors_of(const Variant& v, const EngineRecord& sizes) {
  const std::int64_t B = sizes.batch, S = sizes.capacity, T = -1;
  std::vector<EngineTensor> tensors{{v.tokens, true, "int64", {B, T}, {}},
                                    {v.positions, true, "int64", {B, T}, {}},
                                    {v.logits, false, v.info.dtype, {B, v.all_logits ? T : 1, v.info.vocab_size}, {}}};
  for (const CacheBinding& cache : v.caches) {
    tensors.push_back({cache.past, true, v.info.dtype, {B, cache.heads, S, cache.size}, {}});
    tensors.push_back({cache.present, false, v.info.dtype, {B, cache.heads, S, cache.size}, cache.past});
  }
  return tensors;
}

std::string described(const EngineTensor& tensor) {
  return tensor.dtype + " " + shown(Json(tensor.shape)) +
         (tensor.alias.empty() ? ", memory of its own" : ", the memory of " + tensor.alias);
}

}  // namespace

bool EngineRecord::loads_in(const std::string& here) const {
  return version == here || (later_versions && numbers(here) >= numbers(version));
}

bool EngineRecord::runs_on(const std::string& chip) const {
  constexpr int AMPERE = 80;  // compute capability 8.0
  return std::ranges::count(targets, chip) > 0 || (later_chips && std::atoi(chip.c_str() + 2) >= AMPERE);
}

std::vector<EngineRecord> parse_engines(std::string_view text) {
  const Json data = parse_json(text);
  if (at(data, "schema") != SCHEMA) flaw("its schema is " + shown(at(data, "schema")) + ", not " + std::to_string(SCHEMA));
  std::vector<EngineRecord> records;
  for (const Json& item : array(data, "engines")) records.push_back(read_record(item));
  return records;
}

std::vector<EngineRecord> engines_of(const std::filesystem::path& bundle) {
  std::error_code failed;
  std::vector<std::filesystem::path> folders;
  for (const auto& entry : std::filesystem::directory_iterator(bundle / "engines", failed)) folders.push_back(entry.path());
  std::sort(folders.begin(), folders.end());
  std::vector<EngineRecord> records;
  for (const std::filesystem::path& folder : folders) {
    const std::filesystem::path path = folder / "engine.json";
    if (!std::filesystem::is_regular_file(path, failed)) continue;
    try {
      for (EngineRecord& record : parse_engines(read_text(path))) {
        record.folder = folder;
        records.push_back(std::move(record));
      }
    } catch (const Flaw& error) {
      throw BundleError(path.string() + " is damaged: " + error.what() + "; remove the folder and build again");
    }
  }
  return records;
}

void expect_tensors(const std::vector<EngineTensor>& found, const Variant& variant, const EngineRecord& sizes,
                    const std::string& whose) {
  const std::vector<EngineTensor> due = tensors_of(variant, sizes);
  std::map<std::string_view, const EngineTensor*> named;  // a hostile file has a million
  for (const EngineTensor& tensor : found) named.try_emplace(tensor.name, &tensor);
  for (const EngineTensor& tensor : due) {
    const auto same = named.find(tensor.name);
    if (same == named.end()) throw BundleError(one_line(whose + " has no " + tensor.name + "; build the engine again"));
    if (!(*same->second == tensor))
      throw BundleError(one_line(whose + " has " + tensor.name + " as " + described(*same->second) + "; headpool.json as " +
                                 described(tensor) + "; build the engine again"));
  }
  if (found.size() != due.size())
    throw BundleError(whose + " has " + std::to_string(found.size()) + " inputs and outputs, headpool.json " +
                      std::to_string(due.size()) + "; build the engine again");
}

}  // namespace headpool::detail
