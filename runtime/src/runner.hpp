// What a session runs on: a graph in ONNX Runtime or an engine in TensorRT, with the KV cache of B sequences.
#pragma once

#include "feeding.hpp"

namespace headpool::detail {

struct Sizes {
  std::int64_t batch, capacity, chunk;  // session.hpp's SessionOptions
  bool chosen = false;                  // whether the caller chose the capacity
};

// Used by one thread at a time.
class Runner {
 public:
  virtual ~Runner() = default;

  // The calls that feed `prompts`; all rows' last tokens are in the last column of the last one.
  virtual std::vector<Feed> plan(Prompts prompts, std::span<const std::int64_t> lengths) = 0;

  // Runs a call of this runner's batch; `lengths` are what the cache holds before it.
  virtual void run(const Feed& feed, std::span<const std::int64_t> lengths) = 0;

  // Float [B, V] of the last column of the last call.
  virtual std::span<const float> logits() const = 0;

  // Keeps the first `length` tokens of each sequence.
  virtual void rewind(std::int64_t length) = 0;

  // Of an encoder-decoder, tokens of each source that it last read; else empty.
  virtual std::span<const std::int64_t> sources() const { return {}; }
};

}  // namespace headpool::detail
