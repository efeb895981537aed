#include "ort_runner.hpp"

#include <algorithm>

#include "floats.hpp"

namespace headpool::detail {
namespace {

// A decoder in pattern fused touches only the rows that are used, so that it may have all it will ever need. Other graphs
// read all that there are or plan for them, an encoder-decoder's computes a bias of each.
std::unique_ptr<Cache> cache_of(const OrtModel& model, const Sizes& sizes) {
  if (!model.variant.in_place) return concat_cache(model, sizes);
  const bool only_used = model.variant.info.pattern == "fused" && !model.variant.encoder;
  return static_cache(model, sizes, model.cuda || (only_used && sizes.chosen));
}

}  // namespace

OrtRunner::OrtRunner(const OrtModel& model, const Sizes& sizes)
    : model_(model),
      batch_(static_cast<std::size_t>(sizes.batch)),
      logits_(batch_ * vocabulary() * sizeof(float)),
      cache_(cache_of(model, sizes)) {
  if (model.variant.dtype != DataType::fp32) half_ = Memory(raw_bytes(sizes.batch, 1));
  step_.emplace(model, sizes.batch, 1, raw(), raw_bytes(sizes.batch, 1));
}

void OrtRunner::run(const Feed& feed, std::span<const std::int64_t> lengths) {
  std::vector<std::byte> all;  // logits of every position, which only the last of is wanted
  std::optional<Call> own;
  std::span<std::byte> target{raw(), raw_bytes(step_->batch(), 1)};
  if (feed.T > 1) {
    if (model_.variant.all_logits) {
      all.resize(raw_bytes(step_->batch(), feed.T));
      target = all;
    }
    own.emplace(model_, step_->batch(), feed.T, target.data(), target.size());
  }
  Call& call = own ? *own : *step_;
  std::copy(feed.tokens.begin(), feed.tokens.end(), call.tokens().begin());
  std::copy(feed.positions.begin(), feed.positions.end(), call.positions().begin());
  cache_->prepare(call, lengths, feed.counts);
  // com.microsoft.GroupQueryAttention takes several tokens of several sequences only while the cache is empty.
  if (model_.variant.info.pattern == "gqa" && batch_ > 1 && feed.T > 1 && std::ranges::max(lengths) > 0) {
    run_rows(feed, target);
  } else {
    cache_->bind(call, 0);
    call.run();
  }
  cache_->commit(call);
  read_logits(target, feed.T);
}

void OrtRunner::run_rows(const Feed& feed, std::span<std::byte> target) {
  const std::size_t bytes = raw_bytes(1, feed.T);
  for (std::int64_t b = 0; b < step_->batch(); ++b) {
    Call row(model_, 1, feed.T, target.data() + static_cast<std::size_t>(b) * bytes, bytes);
    std::copy_n(feed.tokens.begin() + b * feed.T, feed.T, row.tokens().begin());
    std::copy_n(feed.positions.begin() + b * feed.T, feed.T, row.positions().begin());
    cache_->bind(row, b);
    row.run();
  }
}

// Brings the newest logits to `logits_`, where the graph did not write them there itself.
void OrtRunner::read_logits(std::span<const std::byte> written, std::int64_t T) {
  const Variant& v = model_.variant;
  const std::int64_t rows = v.all_logits ? T : 1;
  if (rows == 1 && v.dtype == DataType::fp32) return;
  const std::size_t V = vocabulary(), stride = V * static_cast<std::size_t>(rows);
  for (std::size_t b = 0; b < batch_; ++b)
    to_floats(v.dtype, written.data() + (b * stride + stride - V) * v.item_bytes(), V, floats() + b * V);
}

std::unique_ptr<Runner> OrtModel::runner(const Sizes& sizes) const {
  if (variant.encoder) return seq2seq_runner(*this, sizes);
  return std::make_unique<OrtRunner>(*this, sizes);
}

}  // namespace headpool::detail
