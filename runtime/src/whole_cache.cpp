#include "cache.hpp"

namespace headpool::detail {
namespace {

class WholeCache final : public Cache {
 public:
  WholeCache(const OrtModel& model, const Sizes& sizes) : model_(model), capacity_(sizes.capacity), chunk_(sizes.chunk) {
    std::size_t all = 0;
    for (const CacheBinding& cache : model.variant.caches) {
      places_.push_back(all);
      const std::size_t bytes = bytes_of({sizes.batch, cache.heads, capacity_, cache.size}, item_bytes(cache.type));
      all = bytes_of({static_cast<std::int64_t>(all + bytes + ALIGNMENT - 1) / ALIGNMENT}, ALIGNMENT);
    }
    memory_ = model.zeros(all);
  }

  std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t> lengths) override {
    return right_padded(prompts, lengths, capacity_, chunk_);
  }

  void bind(Call& call, std::int64_t first) override {
    if (call.bound_rows == capacity_) return;
    for (std::size_t i = 0; i < places_.size(); ++i) {
      const CacheBinding& cache = model_.variant.caches[i];
      const std::int64_t shape[] = {call.batch(), cache.heads, capacity_, cache.size};
      const std::size_t sequence = static_cast<std::size_t>(cache.heads * capacity_) * cache.row_bytes();
      std::byte* data = memory_.get() + places_[i] + static_cast<std::size_t>(first) * sequence;
      const std::size_t bytes = static_cast<std::size_t>(call.batch()) * sequence;
      call.bind_input(cache.past, data, bytes, shape, element_of(cache.type), model_.memory);
      call.bind_output(cache.present, data, bytes, shape, element_of(cache.type), model_.memory);
    }
    call.bound_rows = capacity_;
  }

  void prepare(Call&, std::span<const std::int64_t>, std::span<const std::int64_t>) override {}
  void commit(const Call&) override {}
  void rewind(std::int64_t) override {}  // the rows after it are overwritten before they are seen

 private:
  static constexpr std::int64_t ALIGNMENT = 256;  // as a GPU's own allocations have

  const OrtModel& model_;
  std::int64_t capacity_, chunk_;
  std::vector<std::size_t> places_;  // of the tensors
  std::shared_ptr<std::byte> memory_;
};

}  // namespace

std::unique_ptr<Cache> whole_cache(const OrtModel& model, const Sizes& sizes) {
  return std::make_unique<WholeCache>(model, sizes);
}

}  // namespace headpool::detail
