#include "call.hpp"

namespace headpool::detail {

Call::Call(const OrtModel& model, std::int64_t batch, std::int64_t T, void* logits, std::size_t logits_bytes)
    : model_(model),
      batch_(batch),
      T_(T),
      tokens_(static_cast<std::size_t>(batch * T)),
      positions_(tokens_.size()),
      memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
      binding_(model.runtime) {
  const Variant& v = model.variant;
  const std::int64_t shape[] = {batch, T}, scores[] = {batch, v.all_logits ? T : 1, v.info.vocab_size};
  constexpr auto INT = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  bind_input(v.tokens, tokens_.data(), tokens_.size() * sizeof(Token), shape, INT);
  bind_input(v.positions, positions_.data(), positions_.size() * sizeof(std::int64_t), shape, INT);
  bind_output(v.logits, logits, logits_bytes, scores, model.element());
}

Ort::Value Call::value(void* data, std::size_t bytes, std::span<const std::int64_t> shape,
                       ONNXTensorElementDataType type) const {
  return Ort::Value::CreateTensor(memory_, data, bytes, shape.data(), shape.size(), type);
}

void Call::bind_input(const std::string& name, void* data, std::size_t bytes, std::span<const std::int64_t> shape,
                      ONNXTensorElementDataType type) {
  binding_.BindInput(name.c_str(), value(data, bytes, shape, type));
}

void Call::bind_output(const std::string& name, void* data, std::size_t bytes, std::span<const std::int64_t> shape,
                       ONNXTensorElementDataType type) {
  binding_.BindOutput(name.c_str(), value(data, bytes, shape, type));
}

void Call::run() { model_.runtime.Run(options_, binding_); }

}  // namespace headpool::detail
