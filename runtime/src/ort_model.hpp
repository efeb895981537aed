// A variant's graph in ONNX Runtime.
#pragma once

#include <algorithm>
#include <map>
#include <optional>

#include "memory.hpp"
#include "onnxruntime.hpp"
#include "state.hpp"
#include "zeros.hpp"

namespace headpool::detail {

inline ONNXTensorElementDataType element_of(DataType type) {
  switch (type) {
    case DataType::fp16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DataType::bf16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case DataType::int8:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

struct OrtModel final : Model::State {
  using State::State;

  // The relative positions of an encoder-decoder end nowhere, memory does.
  std::int64_t most_tokens(std::int64_t) const override {
    return variant.encoder ? std::min<std::int64_t>(variant.info.max_positions, 8192) : variant.info.max_positions;
  }
  std::unique_ptr<Runner> runner(const Sizes& sizes) const override;

  ONNXTensorElementDataType element() const { return element_of(variant.dtype); }  // of activations

  // Where caches lie: the host's memory, or with `cuda` that of its provider.
  bool cuda = false;
  Ort::MemoryInfo memory{nullptr};
  mutable std::optional<Zeros> zeroing;  // with `cuda`

  // Such memory, all zeros: a masked row is multiplied by probability 0, and 0 times the NaN that old bytes may make is NaN.
  // The model outlives it. Throws MemoryError, Ort::Exception.
  std::shared_ptr<std::byte> zeros(std::size_t bytes) const;

  // In pattern fused, what `runtime` reads and what therefore outlives it: the weights' files by name, and tensors in them
  // or in copies.
  std::map<std::string, std::shared_ptr<const Memory>> weights;
  std::vector<Memory> copies;
  std::vector<Ort::Value> values;
  mutable Ort::Session runtime{nullptr};  // Run may be called from several threads
  mutable Ort::Session encoder{nullptr};  // of an encoder-decoder
};

}  // namespace headpool::detail
