#include <algorithm>
#include <cstring>

#include "cache.hpp"

namespace headpool::detail {

Layout::Layout(const Variant& variant, std::int64_t batch) {
  for (const CacheBinding& cache : variant.caches) {
    const auto slabs = static_cast<std::size_t>(batch * cache.heads);
    tensors_.push_back({slabs, cache.row_bytes(), row_bytes_});
    row_bytes_ += slabs * cache.row_bytes();
  }
}

std::size_t Layout::bytes(std::int64_t rows) const {
  if (row_bytes_ > (std::size_t{1} << 62) / static_cast<std::size_t>(rows))
    throw MemoryError("a cache of " + std::to_string(rows) +
                      " tokens a sequence has no address; lower the batch or the capacity");
  return row_bytes_ * static_cast<std::size_t>(rows);
}

namespace {

class StaticCache final : public Cache {
 public:
  StaticCache(const OrtModel& model, const Sizes& sizes, bool whole)
      : model_(model),
        layout_(model.variant, sizes.batch),
        capacity_(sizes.capacity),
        chunk_(sizes.chunk),
        whole_(whole),
        memory_(model.zeros(layout_.bytes(capacity_))),
        rows_(whole ? capacity_ : 0) {}

  std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t> lengths) override {
    ahead_ = 0;
    for (std::size_t b = 0; b < prompts.size(); ++b)
      ahead_ = std::max(ahead_, lengths[b] + static_cast<std::int64_t>(prompts[b].size()) + 1);
    return right_padded(prompts, lengths, capacity_, chunk_);
  }

  void prepare(Call& call, std::span<const std::int64_t> lengths, std::span<const std::int64_t>) override {
    const std::span<const std::int64_t> positions = call.positions();
    std::int64_t need = 0;
    for (std::size_t last = static_cast<std::size_t>(call.T()) - 1; last < positions.size();
         last += static_cast<std::size_t>(call.T()))
      need = std::max(need, positions[last] + 1);
    if (need > rows_) resize(next_rows(need), *std::max_element(lengths.begin(), lengths.end()));
  }

  void bind(Call& call, std::int64_t first) override {
    if (call.bound_rows == rows_) return;
    const auto sequence = static_cast<std::size_t>(first);
    for (std::size_t i = 0; i < layout_.tensors().size(); ++i) {
      const CacheBinding& cache = model_.variant.caches[i];
      const std::int64_t shape[] = {call.batch(), cache.heads, rows_, cache.size};
      const auto slabs = static_cast<std::size_t>(cache.heads);
      std::byte* data = memory_.get() + layout_.offset(i, sequence * slabs, rows_);
      const std::size_t bytes = static_cast<std::size_t>(call.batch() * rows_) * slabs * layout_.tensors()[i].row_bytes;
      call.bind_input(cache.past, data, bytes, shape, element_of(cache.type), model_.memory);
      call.bind_output(cache.present, data, bytes, shape, element_of(cache.type), model_.memory);
    }
    call.bound_rows = rows_;
  }

  void commit(const Call&) override {}

  // The rows after it are overwritten before they are seen; but where most are such, S follows the context down, too. A few
  // tokens taken back change nothing, so that it does not go up and down with them.
  void rewind(std::int64_t length) override {
    ahead_ = 0;
    if (whole_) return;
    const std::int64_t rows = rounded(length + step_from(length));
    if (!length)
      rows_ = 0;
    else if (rows_ > rows + rows / 4)
      resize(rows, length);
  }

 private:
  // In decoding S grows by 1/16, so that at most that is read for nothing and at most 16 rows are moved a token, a small part
  // of what a step reads. A prefill that goes on to `ahead_` rows doubles S until then: its early chunks do not read all of it.
  std::int64_t next_rows(std::int64_t need) const {
    if (ahead_ > need) {
      const std::int64_t doubled = std::max(need, 2 * rows_);
      need = ahead_ <= doubled + 64 ? ahead_ : doubled;
    } else if (rows_) {
      need = std::max(need, rows_ + step_from(rows_));
    }
    return rounded(need);
  }

  static std::int64_t step_from(std::int64_t rows) { return std::max<std::int64_t>(64, rows / 16); }
  std::int64_t rounded(std::int64_t rows) const { return std::min(capacity_, (rows + 63) / 64 * 64); }

  // Every slab moves up, the last one first, or down, the first one first, so that none is written over before it has moved.
  // The rows after those used become zeros: a masked row is multiplied by probability 0, and 0 times the NaN that old bytes may
  // make is NaN.
  void resize(std::int64_t rows, std::int64_t used) {
    const bool up = rows > rows_;
    const std::size_t tensors = layout_.tensors().size();
    for (std::size_t n = 0; n < tensors; ++n) {
      const std::size_t i = up ? tensors - 1 - n : n;
      const Layout::Tensor& tensor = layout_.tensors()[i];
      const std::size_t kept = static_cast<std::size_t>(used) * tensor.row_bytes;
      const std::size_t all = static_cast<std::size_t>(rows) * tensor.row_bytes;
      for (std::size_t m = 0; m < tensor.slabs; ++m) {
        const std::size_t slab = up ? tensor.slabs - 1 - m : m;
        std::byte* to = memory_.get() + layout_.offset(i, slab, rows);
        if (kept) std::memmove(to, memory_.get() + layout_.offset(i, slab, rows_), kept);
        if (written_) std::memset(to + kept, 0, all - kept);
      }
    }
    rows_ = rows;
    written_ = true;
  }

  const OrtModel& model_;
  Layout layout_;
  std::int64_t capacity_, chunk_;
  bool whole_;
  std::shared_ptr<std::byte> memory_;
  std::int64_t rows_;       // S
  std::int64_t ahead_ = 0;  // rows that the prefill now running will need, and one for the first decoded token
  bool written_ = false;    // whether the memory holds anything but zeros
};

}  // namespace

std::unique_ptr<Cache> static_cache(const OrtModel& model, const Sizes& sizes, bool whole) {
  return std::make_unique<StaticCache>(model, sizes, whole);
}

}  // namespace headpool::detail
