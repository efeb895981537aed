#include "zeros.hpp"

#include <algorithm>
#include <string>

namespace headpool::detail {
namespace {

constexpr std::size_t MOST = std::size_t{1} << 30;  // of one call: CUDA's kernel counts elements in 32 bits
constexpr char INT64 = 7, UINT8 = 2;                // TensorProto.DataType
constexpr char STRING = 2;                          // wire types of protobuf
constexpr char TENSOR = 4;                          // AttributeProto.AttributeType

std::string field(int number, const std::string& content) {
  return std::string{static_cast<char>(number << 3 | STRING), static_cast<char>(content.size())} + content;
}
std::string field(int number, char value) { return {static_cast<char>(number << 3), value}; }

// A ValueInfoProto of one dimension: `size`, a TensorShapeProto.Dimension.
std::string value(const std::string& name, char type, const std::string& size) {
  return field(1, name) + field(2, field(1, field(1, type) + field(2, field(1, size))));
}

// A ModelProto of one node: count → zeros [count], uint8. All of its parts are shorter than 128 bytes.
std::string model() {
  const std::string zero = field(1, char{1}) + field(2, UINT8) + field(9, std::string(1, '\0'));
  const std::string type{'\xA0', '\x01', TENSOR};  // field 20, whose number takes two bytes
  const std::string attribute = field(1, "value") + field(5, zero) + type;
  const std::string node = field(1, "count") + field(2, "zeros") + field(4, "ConstantOfShape") + field(5, attribute);
  const std::string graph = field(1, node) + field(2, "zeros") + field(11, value("count", INT64, field(1, char{1}))) +
                            field(12, value("zeros", UINT8, field(2, "n")));
  return field(1, char{8}) + field(7, graph) + field(8, field(2, char{13}));
}

Ort::Session load(Ort::Env& env, const Ort::SessionOptions& options) {
  const std::string bytes = model();
  return {env, bytes.data(), bytes.size(), options};
}

}  // namespace

Zeros::Zeros(Ort::Env& env, const Ort::SessionOptions& options) : graph_(load(env, options)) {}

void Zeros::fill(const Ort::MemoryInfo& where, std::byte* data, std::size_t bytes) {
  const auto host = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  while (bytes) {
    std::int64_t count = static_cast<std::int64_t>(std::min(bytes, MOST));
    const std::int64_t one = 1;
    Ort::IoBinding binding(graph_);
    binding.BindInput("count", Ort::Value::CreateTensor(host, &count, 1, &one, 1));
    binding.BindOutput("zeros", Ort::Value::CreateTensor(where, data, static_cast<std::size_t>(count), &count, 1,
                                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8));
    graph_.Run(Ort::RunOptions(), binding);
    data += count, bytes -= static_cast<std::size_t>(count);
  }
}

}  // namespace headpool::detail
