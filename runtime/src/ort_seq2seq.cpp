#include <algorithm>

#include "ort_runner.hpp"

namespace headpool::detail {
namespace {

// What the encoder leaves for cross-attention is computed once a source and bound to the decoder's step. The decoder sees a
// token a call from row 0 on; its rows are the start token and what was decoded. A sequence that stays while others go on gets
// pads: a static cache has them overwritten, a concat cache keeps them, which nothing hides.
class Seq2SeqRunner final : public Runner {
 public:
  Seq2SeqRunner(const OrtModel& model, const Sizes& sizes)
      : model_(model),
        encoder_(*model.variant.encoder),
        decoder_(model, {sizes.batch, sizes.capacity, 1}),
        sources_(static_cast<std::size_t>(sizes.batch)),
        rows_(sources_),
        step_{1, sources_, sources_, sources_},
        blocks_(encoder_.caches.size()) {}

  std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t>) override { return {whole(prompts)}; }

  void run(const Feed& feed, std::span<const std::int64_t>) override {
    if (rows_.front()) {
      std::ranges::copy(feed.tokens, step_.tokens.begin());
      std::ranges::copy(feed.counts, step_.counts.begin());
    } else {
      encode(feed);
      std::ranges::fill(step_.tokens, encoder_.start);
      std::ranges::fill(step_.counts, 1);
    }
    std::ranges::copy(rows_, step_.positions.begin());
    decoder_.run(step_, rows_);
    for (std::size_t b = 0; b < rows_.size(); ++b) rows_[b] += step_.counts[b];
  }

  std::span<const float> logits() const override { return decoder_.logits(); }
  std::span<const std::int64_t> sources() const override { return sources_; }

  void rewind(std::int64_t length) override {
    const std::int64_t rows = length ? 1 + length - sources_.front() : 0;
    decoder_.rewind(rows);
    std::ranges::fill(rows_, rows);
  }

 private:
  // Memory that the next sources use again where they fit in.
  struct Block {
    std::shared_ptr<std::byte> data;
    std::size_t bytes = 0;
  };

  void encode(const Feed& feed) {
    constexpr auto INT = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    const auto B = static_cast<std::int64_t>(sources_.size()), E = feed.T;
    const std::int64_t shape[] = {B, E};
    tokens_ = feed.tokens;
    mask_.assign(tokens_.size(), 0);
    for (std::size_t b = 0; b < sources_.size(); ++b)
      std::fill_n(mask_.begin() + static_cast<std::int64_t>(b) * E, feed.counts[b], 1);
    const auto host = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto ids = [&](std::vector<std::int64_t>& values) {
      return Ort::Value::CreateTensor(host, values.data(), values.size() * sizeof(std::int64_t), shape, 2, INT);
    };
    Ort::IoBinding binding(model_.encoder);
    binding.BindInput(encoder_.tokens.c_str(), ids(tokens_));
    binding.BindInput(encoder_.mask.c_str(), ids(mask_));
    Call& step = decoder_.step();
    step.bind_input(encoder_.decoder_mask, mask_.data(), mask_.size() * sizeof(std::int64_t), shape, INT);
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      const CacheBinding& cache = encoder_.caches[i];
      const std::int64_t sizes[] = {B, cache.heads, E, cache.size};
      const std::size_t bytes = bytes_of({B, cache.heads, E, cache.size}, item_bytes(cache.type));
      if (bytes > blocks_[i].bytes) blocks_[i] = {model_.zeros(bytes), bytes};
      std::byte* data = blocks_[i].data.get();
      binding.BindOutput(cache.present.c_str(),
                         Ort::Value::CreateTensor(model_.memory, data, bytes, sizes, 4, element_of(cache.type)));
      step.bind_input(cache.past, data, bytes, sizes, element_of(cache.type), model_.memory);
    }
    model_.encoder.Run(Ort::RunOptions(), binding);
    sources_ = feed.counts;
  }

  const OrtModel& model_;
  const Encoder& encoder_;
  OrtRunner decoder_;
  std::vector<std::int64_t> sources_, rows_;  // of each sequence: tokens of its source, rows of the self-attention's caches
  Feed step_;
  std::vector<std::int64_t> tokens_, mask_;  // of the source, [B, E]
  std::vector<Block> blocks_;
};

}  // namespace

std::unique_ptr<Runner> seq2seq_runner(const OrtModel& model, const Sizes& sizes) {
  return std::make_unique<Seq2SeqRunner>(model, sizes);
}

}  // namespace headpool::detail
