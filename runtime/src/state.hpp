// What a model holds.
#pragma once

#include <headpool/model.hpp>
#include <map>

#include "manifest.hpp"
#include "memory.hpp"
#include "onnxruntime.hpp"

namespace headpool {

struct Model::State {
  detail::Variant variant;
  int threads;
  // In pattern fused, what `runtime` reads and what therefore outlives it: the weights' files by name, and tensors in them.
  std::map<std::string, std::shared_ptr<const detail::Memory>> weights;
  std::vector<Ort::Value> values;
  mutable Ort::Session runtime{nullptr};  // Run may be called from several threads

  ONNXTensorElementDataType element() const {
    switch (variant.dtype) {
      case detail::DataType::fp16:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
      case detail::DataType::bf16:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
      default:
        return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
  }
};

}  // namespace headpool
