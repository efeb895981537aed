// What a model holds.
#pragma once

#include <headpool/model.hpp>

#include "manifest.hpp"
#include "memory.hpp"
#include "onnxruntime.hpp"

namespace headpool {

struct Model::State {
  detail::Variant variant;
  int threads;
  std::vector<std::shared_ptr<const detail::Memory>> weights;  // which `runtime` reads, and which therefore outlive it
  mutable Ort::Session runtime{nullptr};                       // Run may be called from several threads

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
