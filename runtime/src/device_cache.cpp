#include "cache.hpp"

namespace headpool::detail {
namespace {

// A static cache on the provider's device, all of it from the start: bound once, written in place.
class DeviceCache final : public Cache {
 public:
  DeviceCache(const OrtModel& model, std::int64_t batch, std::int64_t capacity, std::int64_t chunk)
      : model_(model), capacity_(capacity), chunk_(chunk) {
    for (const CacheBinding& cache : model.variant.caches)
      tensors_.push_back(model.zeros(bytes_of({batch, cache.heads, capacity, cache.size}, item_bytes(cache.type))));
  }

  std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t> lengths) override {
    return right_padded(prompts, lengths, capacity_, chunk_);
  }

  void bind(Call& call, std::int64_t first) override {
    if (call.bound_rows == capacity_) return;
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      const CacheBinding& cache = model_.variant.caches[i];
      const std::int64_t shape[] = {call.batch(), cache.heads, capacity_, cache.size};
      const std::size_t sequence = static_cast<std::size_t>(cache.heads * capacity_) * cache.row_bytes();
      std::byte* data = tensors_[i].get() + static_cast<std::size_t>(first) * sequence;
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
  const OrtModel& model_;
  std::int64_t capacity_, chunk_;
  std::vector<std::shared_ptr<std::byte>> tensors_;
};

}  // namespace

std::unique_ptr<Cache> device_cache(const OrtModel& model, std::int64_t batch, std::int64_t capacity, std::int64_t chunk) {
  return std::make_unique<DeviceCache>(model, batch, capacity, chunk);
}

}  // namespace headpool::detail
