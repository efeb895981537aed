// headpool.json: what it says, checked. exporter/contract.py and exporter/bundle.py are what writes it.
#pragma once

#include <headpool/model.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace headpool::detail {

enum class DataType { fp32, fp16, bf16 };

// One K or V cache: an input and an output of [B, heads, rows, size].
struct CacheBinding {
  std::string past, present;
  std::int64_t heads, size;
};

struct Variant {
  ModelInfo info;
  std::string graph;
  std::vector<std::string> weights;
  DataType dtype;
  bool in_place;                                // the static form
  bool all_logits;                              // of every position of a call, not of the last
  std::string tokens, positions, mask, logits;  // mask: of the concat form
  std::vector<CacheBinding> caches;

  std::size_t item_bytes() const { return dtype == DataType::fp32 ? 4 : 2; }
};

// Throws BundleError for all that is not as it should be.
std::vector<Variant> parse_manifest(std::string_view text);
std::vector<Variant> read_manifest(const std::filesystem::path& bundle);

// A file of the bundle by its name. Throws BundleError where it is missing or a link that leaves the folder.
std::filesystem::path file_in(const std::filesystem::path& bundle, const std::string& name);

}  // namespace headpool::detail
