#include "runner.hpp"

#include <algorithm>

#include "../floats.hpp"
#include "../guard.hpp"
#include "../memory.hpp"

namespace headpool::detail {
namespace {

// Everything is bound once, to memory for the longest call; both profiles use the same. A step copies tokens and positions to
// the GPU, runs and copies logits back, from its second time on as one CUDA graph.
class TensorRTRunner final : public Runner {
 public:
  TensorRTRunner(const Variant& variant, const EngineRecord& record, const std::shared_ptr<const Engine>& engine,
                 std::int64_t capacity, std::int64_t chunk)
      : variant_(variant),
        batch_(record.batch),
        capacity_(capacity),
        chunk_(std::min(chunk, record.prefill)),
        captures_itself_(engine->captures_itself()),
        lane_(engine->lane()) {
    lane_->enter();
    const std::size_t item = variant.item_bytes();
    const std::int64_t B = batch_, V = variant.info.vocab_size;
    for (const CacheBinding& cache : variant.caches) {
      const auto memory = device(bytes_of({B, cache.heads, record.capacity, cache.size}, item));
      lane_->bind(cache.past, memory);
      lane_->bind(cache.present, memory);  // in place
    }
    const std::size_t ids = bytes_of({B, chunk_}, sizeof(Token));
    lane_->bind(variant.tokens, device_tokens_ = device(ids));
    lane_->bind(variant.positions, device_positions_ = device(ids));
    lane_->bind(variant.logits, device_logits_ = device(bytes_of({B, variant.all_logits ? chunk_ : 1, V}, item)));
    tokens_ = lane_->host_memory(ids);
    positions_ = lane_->host_memory(ids);
    raw_ = lane_->host_memory(bytes_of({B, V}, item));
    logits_.resize(bytes_of({B, V}, 1));
    set_columns(Profile::decode, 1);
    lane_->wait();
  }

  std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t> lengths) override {
    return right_padded(prompts, lengths, capacity_, chunk_);
  }

  void run(const Feed& feed, std::span<const std::int64_t>) override {
    lane_->enter();
    std::copy(feed.tokens.begin(), feed.tokens.end(), reinterpret_cast<Token*>(tokens_.get()));
    std::copy(feed.positions.begin(), feed.positions.end(), reinterpret_cast<std::int64_t*>(positions_.get()));
    if (feed.T > 1) {
      set_columns(Profile::prefill, feed.T);
      issue(Profile::prefill, feed.T);
    } else {
      step();
    }
    lane_->wait();
    to_floats(variant_.dtype, raw_.get(), logits_.size(), logits_.data());
  }

  std::span<const float> logits() const override { return logits_; }
  void rewind(std::int64_t) override {}  // the rows after it are overwritten before they are seen

 private:
  std::byte* device(std::size_t bytes) {
    held_.push_back(lane_->device_memory(bytes));
    return held_.back().get();
  }

  void set_columns(Profile profile, std::int64_t T) {
    const std::int64_t shape[] = {batch_, T};
    lane_->set_shape(profile, variant_.tokens, shape);
    lane_->set_shape(profile, variant_.positions, shape);
  }

  void step() {
    const auto work = [this] { issue(Profile::decode, 1); };
    if (captures_itself_ || !stepped_) {  // TensorRT allocates what it needs in a first run
      work();
      stepped_ = true;
      return;
    }
    if (!captured_) {
      lane_->capture(work);
      captured_ = true;
    }
    lane_->launch();
  }

  void issue(Profile profile, std::int64_t T) {
    const std::size_t ids = static_cast<std::size_t>(batch_ * T) * sizeof(Token);
    lane_->copy(device_tokens_, tokens_.get(), ids);
    lane_->copy(device_positions_, positions_.get(), ids);
    lane_->run(profile);
    const auto B = static_cast<std::size_t>(batch_), rows = static_cast<std::size_t>(variant_.all_logits ? T : 1);
    const std::size_t row = static_cast<std::size_t>(variant_.info.vocab_size) * variant_.item_bytes();
    if (rows == 1) return lane_->copy(raw_.get(), device_logits_, B * row);
    for (std::size_t b = 0; b < B; ++b)  // of the last column
      lane_->copy(raw_.get() + b * row, device_logits_ + (b * rows + rows - 1) * row, row);
  }

  const Variant& variant_;
  const std::int64_t batch_, capacity_, chunk_;
  const bool captures_itself_;
  bool stepped_ = false, captured_ = false;
  std::vector<std::shared_ptr<std::byte>> held_;  // on the GPU; freed after what uses it
  std::byte *device_tokens_, *device_positions_, *device_logits_;
  std::shared_ptr<std::byte> tokens_, positions_, raw_;  // int64 [B, chunk] twice, logits [B, V]
  std::vector<float> logits_;
  std::unique_ptr<Lane> lane_;
};

}  // namespace

std::unique_ptr<Runner> tensorrt_runner(const Variant& variant, const EngineRecord& record,
                                        const std::shared_ptr<const Engine>& engine, std::int64_t capacity,
                                        std::int64_t chunk) {
  return std::make_unique<TensorRTRunner>(variant, record, engine, capacity, chunk);
}

}  // namespace headpool::detail
