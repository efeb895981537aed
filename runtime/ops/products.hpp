// ONNX Runtime's own products with weights, in kernels of ours: for many rows of x, where arithmetic bounds and not memory.
#pragma once

#include <iterator>

#include "kernels.hpp"
#include "ort.hpp"

namespace headpool {

// Gemm(transB=1).
class Gemm {
 public:
  Gemm(const OrtKernelInfo* info, bool bias) : bias_(bias) {
    const float one = 1;
    const int64_t no = 0, yes = 1;
    Ort::OpAttr attributes[] = {Ort::OpAttr("alpha", &one, 1, ORT_OP_ATTR_FLOAT),
                                Ort::OpAttr("beta", &one, 1, ORT_OP_ATTR_FLOAT), Ort::OpAttr("transA", &no, 1, ORT_OP_ATTR_INT),
                                Ort::OpAttr("transB", &yes, 1, ORT_OP_ATTR_INT)};
    const char* names[] = {"T"};
    const ONNXTensorElementDataType types[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};
    op_ = Ort::Op::Create(info, "Gemm", "", 13, names, types, 1, attributes, 4, bias ? 3 : 2, 1);
  }

  void operator()(const OrtKernelContext* context, const OrtValue* x, const OrtValue* w, const OrtValue* bias, OrtValue* y) {
    const OrtValue* inputs[] = {x, w, bias};
    OrtValue* outputs[] = {y};
    op_.Invoke(context, inputs, bias_ ? 3 : 2, outputs, 1);
  }

 private:
  bool bias_;
  StandardOp op_;
};

// With quantised weights, of which Gemm has no form.
class QuantisedProduct {
 public:
  QuantisedProduct(const OrtKernelInfo* info, size_t N, size_t K, size_t bits) {
    const int64_t numbers[] = {static_cast<int64_t>(N), static_cast<int64_t>(K), static_cast<int64_t>(bits), BLOCK, 4};
    const char* attributes_named[] = {"N", "K", "bits", "block_size", "accuracy_level"};
    std::vector<Ort::OpAttr> attributes;
    for (size_t i = 0; i < std::size(numbers); ++i)
      attributes.emplace_back(attributes_named[i], &numbers[i], 1, ORT_OP_ATTR_INT);
    const char* names[] = {"T1", "T2", "T3", "T4"};
    const ONNXTensorElementDataType types[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                                               ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32};
    op_ = Ort::Op::Create(info, "MatMulNBits", "com.microsoft", 1, names, types, std::size(types), attributes.data(),
                          attributes.size(), 3, 1);
  }

  void operator()(const OrtKernelContext* context, const OrtValue* x, const OrtValue* w, const OrtValue* scales, OrtValue* y) {
    const OrtValue* inputs[] = {x, w, scales};
    OrtValue* outputs[] = {y};
    op_.Invoke(context, inputs, 3, outputs, 1);
  }

 private:
  StandardOp op_;
};

}  // namespace headpool
