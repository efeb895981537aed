#include <algorithm>
#include <cstring>

#include "cache.hpp"

namespace headpool::detail {
namespace {

// `columns_` columns, P, of which every sequence's real ones are told from its pads by `real_`.
class ConcatCache final : public Cache {
 public:
  // Prompts of unequal lengths leave pads, which `repack` takes out before they need more than twice the capacity.
  ConcatCache(const OrtModel& model, const Sizes& sizes)
      : model_(model),
        layout_(model.variant, sizes.batch),
        batch_(static_cast<std::size_t>(sizes.batch)),
        most_(sizes.batch > 1 ? 2 * sizes.capacity : sizes.capacity),
        chunk_(sizes.chunk),
        past_(layout_.bytes(most_)),
        present_(layout_.bytes(most_)),
        real_(batch_ * static_cast<std::size_t>(most_)),
        mask_(real_.size() * sizeof(std::int64_t)) {}

  std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t> lengths) override {
    std::int64_t width = 0;
    for (const auto& prompt : prompts) width = std::max(width, static_cast<std::int64_t>(prompt.size()));
    if (columns_ + width > most_) repack(lengths);
    return left_padded(prompts, lengths, chunk_);
  }

  void prepare(Call& call, std::span<const std::int64_t> lengths, std::span<const std::int64_t> counts) override {
    if (columns_ + call.T() > most_) repack(lengths);
    const auto total = static_cast<std::size_t>(columns_ + call.T()), T = static_cast<std::size_t>(call.T());
    for (std::size_t b = 0; b < batch_; ++b) {
      const std::size_t pads = counts.empty() ? 0 : T - static_cast<std::size_t>(counts[b]);
      char* row = real(b);
      std::fill_n(row + columns_, pads, char{0});
      std::fill(row + columns_ + pads, row + total, char{1});
      std::copy_n(row, total, mask() + b * total);
    }
  }

  void bind(Call& call, std::int64_t first) override {
    const auto sequence = static_cast<std::size_t>(first), count = static_cast<std::size_t>(call.batch());
    const std::int64_t total = columns_ + call.T();
    const std::int64_t mask_shape[] = {call.batch(), total};
    if (!model_.variant.mask.empty())
      call.bind_input(model_.variant.mask, mask() + sequence * static_cast<std::size_t>(total),
                      count * static_cast<std::size_t>(total) * sizeof(std::int64_t), mask_shape,
                      ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    for (std::size_t i = 0; i < layout_.tensors().size(); ++i) {
      const CacheBinding& cache = model_.variant.caches[i];
      const auto slabs = static_cast<std::size_t>(cache.heads);
      const auto part = [&](const Memory& memory, std::int64_t rows) {
        return memory.data() + layout_.offset(i, sequence * slabs, rows);
      };
      const auto bytes = [&](std::int64_t rows) {
        return count * slabs * static_cast<std::size_t>(rows) * layout_.tensors()[i].row_bytes;
      };
      const std::int64_t before[] = {call.batch(), cache.heads, columns_, cache.size};
      const std::int64_t after[] = {call.batch(), cache.heads, total, cache.size};
      call.bind_input(cache.past, part(past_, columns_), bytes(columns_), before, element_of(cache.type));
      call.bind_output(cache.present, part(present_, total), bytes(total), after, element_of(cache.type));
    }
  }

  void commit(const Call& call) override {
    columns_ += call.T();
    std::swap(past_, present_);
  }

  void rewind(std::int64_t length) override { repack(std::vector<std::int64_t>(batch_, length)); }

 private:
  char* real(std::size_t b) const { return reinterpret_cast<char*>(real_.data()) + b * static_cast<std::size_t>(most_); }
  std::int64_t* mask() const { return reinterpret_cast<std::int64_t*>(mask_.data()); }

  // Row b keeps its first kept[b] real columns, at the end of as few columns as that takes.
  void repack(std::span<const std::int64_t> kept) {
    const std::int64_t columns = *std::max_element(kept.begin(), kept.end());
    for (std::size_t b = 0; b < batch_; ++b) {
      char* row = real(b);
      const std::int64_t pads = columns - kept[b];
      for (std::size_t i = 0; i < layout_.tensors().size(); ++i) {
        const Layout::Tensor& tensor = layout_.tensors()[i];
        const std::size_t slabs = tensor.slabs / batch_;
        for (std::size_t slab = b * slabs; slab < (b + 1) * slabs; ++slab) {
          const std::byte* from = past_.data() + layout_.offset(i, slab, columns_);
          std::byte* to = present_.data() + layout_.offset(i, slab, columns);
          std::memset(to, 0, static_cast<std::size_t>(pads) * tensor.row_bytes);
          to += static_cast<std::size_t>(pads) * tensor.row_bytes;
          std::int64_t left = kept[b];
          for (std::int64_t column = 0; left; ++column) {
            if (!row[column]) continue;
            std::memcpy(to, from + static_cast<std::size_t>(column) * tensor.row_bytes, tensor.row_bytes);
            to += tensor.row_bytes, --left;
          }
        }
      }
      std::fill_n(row, pads, char{0});
      std::fill(row + pads, row + columns, char{1});
    }
    std::swap(past_, present_);
    columns_ = columns;
  }

  const OrtModel& model_;
  Layout layout_;
  std::size_t batch_;
  std::int64_t most_, chunk_;
  std::int64_t columns_ = 0;
  Memory past_, present_;
  Memory real_;  // char [B, most]
  Memory mask_;  // int64 [B, P + T] of the call
};

}  // namespace

std::unique_ptr<Cache> concat_cache(const OrtModel& model, const Sizes& sizes) {
  return std::make_unique<ConcatCache>(model, sizes);
}

}  // namespace headpool::detail
