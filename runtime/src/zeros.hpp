// Zeros written where ONNX Runtime's provider has its memory, which nothing in its interface does but a graph.
#pragma once

#include "onnxruntime.hpp"

namespace headpool::detail {

class Zeros {
 public:
  // Runs on the providers that `options` name.
  Zeros(Ort::Env& env, const Ort::SessionOptions& options);

  void fill(const Ort::MemoryInfo& where, std::byte* data, std::size_t bytes);

 private:
  Ort::Session graph_;
};

}  // namespace headpool::detail
