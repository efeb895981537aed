#include "call.hpp"

namespace headpool::detail {

Call::Call(const OrtModel& model, std::int64_t batch, std::int64_t T, void* logits, std::size_t logits_bytes)
    : model_(model),
      batch_(batch),
      T_(T),
      tokens_(static_cast<std::size_t>(batch * T)),
      positions_(tokens_.size()),
      host_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
      token_value_(nullptr),
      position_value_(nullptr),
      binding_(model.runtime) {
  const Variant& v = model.variant;
  const std::int64_t shape[] = {batch, T}, scores[] = {batch, v.all_logits ? T : 1, v.info.vocab_size};
  constexpr auto INT = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  token_value_ = value(tokens_.data(), tokens_.size() * sizeof(Token), shape, INT, nullptr);
  position_value_ = value(positions_.data(), positions_.size() * sizeof(std::int64_t), shape, INT, nullptr);
  bind_indices();
  bind_output(v.logits, logits, logits_bytes, scores, model.element());
}

void Call::bind_indices() {
  binding_.BindInput(model_.variant.tokens.c_str(), token_value_);
  if (!model_.variant.positions.empty()) binding_.BindInput(model_.variant.positions.c_str(), position_value_);
}

Ort::Value Call::value(void* data, std::size_t bytes, std::span<const std::int64_t> shape, ONNXTensorElementDataType type,
                       const OrtMemoryInfo* where) const {
  return Ort::Value::CreateTensor(where ? where : static_cast<const OrtMemoryInfo*>(host_), data, bytes, shape.data(),
                                  shape.size(), type);
}

void Call::bind_input(const std::string& name, void* data, std::size_t bytes, std::span<const std::int64_t> shape,
                      ONNXTensorElementDataType type, const OrtMemoryInfo* where) {
  binding_.BindInput(name.c_str(), value(data, bytes, shape, type, where));
}

void Call::bind_output(const std::string& name, void* data, std::size_t bytes, std::span<const std::int64_t> shape,
                       ONNXTensorElementDataType type, const OrtMemoryInfo* where) {
  binding_.BindOutput(name.c_str(), value(data, bytes, shape, type, where));
}

void Call::run() {
  if (model_.cuda) bind_indices();  // a binding copies the host's memory to the device when it is made
  model_.runtime.Run(options_, binding_);
}

}  // namespace headpool::detail
