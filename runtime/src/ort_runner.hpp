// A session over one graph of ONNX Runtime: a decoder, of its own or beside an encoder.
#pragma once

#include <optional>

#include "cache.hpp"

namespace headpool::detail {

class OrtRunner final : public Runner {
 public:
  OrtRunner(const OrtModel& model, const Sizes& sizes);

  std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t> lengths) override {
    return cache_->plan(prompts, lengths);
  }
  void run(const Feed& feed, std::span<const std::int64_t> lengths) override;
  std::span<const float> logits() const override { return {floats(), batch_ * vocabulary()}; }
  void rewind(std::int64_t length) override { cache_->rewind(length); }

  Call& step() { return *step_; }  // of T = 1, bound once

 private:
  std::size_t vocabulary() const { return static_cast<std::size_t>(model_.variant.info.vocab_size); }
  std::size_t raw_bytes(std::int64_t b, std::int64_t T) const {
    return static_cast<std::size_t>(b * (model_.variant.all_logits ? T : 1)) * vocabulary() * model_.variant.item_bytes();
  }
  std::byte* raw() const { return half_.size() ? half_.data() : logits_.data(); }
  float* floats() const { return reinterpret_cast<float*>(logits_.data()); }

  void run_rows(const Feed& feed, std::span<std::byte> target);
  void read_logits(std::span<const std::byte> written, std::int64_t T);

  const OrtModel& model_;
  std::size_t batch_;
  Memory logits_;  // float [B, V]
  Memory half_;    // the same as a graph in half precision writes it
  std::unique_ptr<Cache> cache_;
  std::optional<Call> step_;
};

// Beside an encoder, which reads the whole of the first prompts once: the decoder begins with the start token.
std::unique_ptr<Runner> seq2seq_runner(const OrtModel& model, const Sizes& sizes);

}  // namespace headpool::detail
