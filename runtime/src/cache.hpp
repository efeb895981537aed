// The KV cache of a session in memory of ours, in both forms. K and V tensors lie one after another; where they grow, packed
// for the rows that they have now, so that memory is touched only as far as it is used.
#pragma once

#include "call.hpp"
#include "feeding.hpp"

namespace headpool::detail {

class Cache {
 public:
  virtual ~Cache() = default;

  // The calls that feed `prompts`; all rows' last tokens are in the last column of the last one.
  virtual std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t> lengths) = 0;

  // Makes room for a call whose positions are set and of whose columns the last counts[b] of row b are real (none given: all).
  virtual void prepare(Call& call, std::span<const std::int64_t> lengths, std::span<const std::int64_t> counts) = 0;

  // Binds sequences first … first + call.batch() − 1 to `call`, which is all of the prepared one, or some of its rows.
  virtual void bind(Call& call, std::int64_t first) = 0;

  // The prepared call has run.
  virtual void commit(const Call& call) = 0;

  // Keeps the first `length` tokens of each sequence.
  virtual void rewind(std::int64_t length) = 0;
};

// Written in place, where the provider's memory is. Most graphs read all S rows there are, so S follows the context in small
// steps, which only the host's memory can; or it is the capacity from the start, `whole`, and the cache is bound once.
std::unique_ptr<Cache> static_cache(const OrtModel& model, const Sizes& sizes, bool whole);

// Each call reads one block of memory and writes the whole cache, with T columns more, to the other.
std::unique_ptr<Cache> concat_cache(const OrtModel& model, const Sizes& sizes);

// Where the tensors lie. A slab is the rows of one KV head of one sequence.
class Layout {
 public:
  Layout(const Variant& variant, std::int64_t batch);

  struct Tensor {
    std::size_t slabs;         // of all sequences
    std::size_t row_bytes;     // of a slab
    std::size_t bytes_before;  // of all tensors before it, a row
  };

  const std::vector<Tensor>& tensors() const { return tensors_; }
  std::size_t bytes(std::int64_t rows) const;  // of all of them. Throws MemoryError
  std::size_t offset(std::size_t tensor, std::size_t slab, std::int64_t rows) const {
    return (tensors_[tensor].bytes_before + slab * tensors_[tensor].row_bytes) * static_cast<std::size_t>(rows);
  }

 private:
  std::vector<Tensor> tensors_;
  std::size_t row_bytes_ = 0;
};

}  // namespace headpool::detail
