// One call of a graph: its binding, and the tokens and positions [B, T] that it reads.
#pragma once

#include <span>

#include "ort_model.hpp"

namespace headpool::detail {

class Call {
 public:
  // Logits, [B, 1, V], or [B, T, V] of a graph that gives all of them, go to `logits`.
  Call(const OrtModel& model, std::int64_t batch, std::int64_t T, void* logits, std::size_t logits_bytes);

  std::span<Token> tokens() { return tokens_; }
  std::span<std::int64_t> positions() { return positions_; }
  std::int64_t batch() const { return batch_; }
  std::int64_t T() const { return T_; }

  // Memory, the host's unless `where` says otherwise, that has to stay where it is until the binding changes or the call is
  // gone.
  void bind_input(const std::string& name, void* data, std::size_t bytes, std::span<const std::int64_t> shape,
                  ONNXTensorElementDataType type, const OrtMemoryInfo* where = nullptr);
  void bind_output(const std::string& name, void* data, std::size_t bytes, std::span<const std::int64_t> shape,
                   ONNXTensorElementDataType type, const OrtMemoryInfo* where = nullptr);

  void run();

  std::int64_t bound_rows = -1;  // of a static cache: what the binding knows

 private:
  void bind_indices();
  Ort::Value value(void* data, std::size_t bytes, std::span<const std::int64_t> shape, ONNXTensorElementDataType type,
                   const OrtMemoryInfo* where) const;

  const OrtModel& model_;
  std::int64_t batch_, T_;
  std::vector<Token> tokens_;
  std::vector<std::int64_t> positions_;
  Ort::MemoryInfo host_;
  Ort::Value token_value_, position_value_;
  Ort::RunOptions options_;
  Ort::IoBinding binding_;
};

}  // namespace headpool::detail
