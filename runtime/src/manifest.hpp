// headpool.json: what it says, checked. exporter/contract.py and exporter/bundle.py are what writes it.
#pragma once

#include <headpool/model.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace headpool::detail {

enum class DataType { fp32, fp16, bf16, int8 };  // int8: of caches only

inline DataType data_type(const std::string& name) {  // one of those
  return name == "fp32" ? DataType::fp32 : name == "fp16" ? DataType::fp16 : name == "bf16" ? DataType::bf16 : DataType::int8;
}

constexpr std::size_t item_bytes(DataType type) { return type == DataType::fp32 ? 4 : type == DataType::int8 ? 1 : 2; }

// One K or V cache: an input and an output of [B, heads, rows, size].
struct CacheBinding {
  std::string past, present;
  std::int64_t heads, size;
  DataType type;

  std::size_t row_bytes() const { return static_cast<std::size_t>(size) * item_bytes(type); }
};

// What an encoder-decoder has besides its decoder: a graph that reads E tokens of an input once.
struct Encoder {
  std::string graph, tokens, mask;  // its inputs: [B, E]
  std::string hidden;               // an output that nothing of ours reads
  std::int64_t hidden_size;
  std::string decoder_mask;          // the decoder's input for the same mask
  std::vector<CacheBinding> caches;  // E rows each: `present` of the encoder is `past` of the decoder's cross-attention
  Token start;                       // that every output begins with
};

struct Variant {
  ModelInfo info;
  std::string graph;
  std::vector<std::string> weights;
  DataType dtype;
  bool in_place;    // the static form
  bool all_logits;  // of every position of a call, not of the last
  // mask: of the concat form. An encoder-decoder has none there, and no positions either.
  std::string tokens, positions, mask, logits;
  std::vector<CacheBinding> caches;
  std::optional<Encoder> encoder;

  std::size_t item_bytes() const { return detail::item_bytes(dtype); }  // of activations
};

// Throws BundleError for all that is not as it should be.
std::vector<Variant> parse_manifest(std::string_view text);
std::vector<Variant> read_manifest(const std::filesystem::path& bundle);

// A file of the bundle by its name. Throws BundleError, with what to do, where it is missing or a link that leaves the folder.
std::filesystem::path file_in(const std::filesystem::path& bundle, const std::string& name,
                              const char* remedy = "export the bundle again");

}  // namespace headpool::detail
