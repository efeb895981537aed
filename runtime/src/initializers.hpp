// Where an ONNX graph's external weights lie, read from its file without protobuf's library.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace headpool::detail {

struct Initializer {
  std::string name, file;
  std::int32_t type;  // TensorProto.DataType, whose numbers are those of ONNXTensorElementDataType
  std::vector<std::int64_t> shape;
  std::uint64_t offset, length;  // bytes of `file`
};

// Those of a serialised ModelProto that lie in other files. Throws BundleError, which calls it `name`, where it is cut short or
// nonsense.
std::vector<Initializer> external_initializers(std::span<const std::byte> model, const std::string& name);

}  // namespace headpool::detail
