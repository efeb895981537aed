#include "initializers.hpp"

#include <charconv>
#include <cstddef>
#include <headpool/error.hpp>
#include <string_view>

namespace headpool::detail {
namespace {

constexpr std::int32_t UNDEFINED = 0, STRING = 8;  // of TensorProto.DataType

struct Damaged {};

[[noreturn]] void damaged() { throw Damaged(); }

// The fields of a message, one after another (protobuf.dev/programming-guides/encoding). onnx.proto says what their numbers
// mean.
class Message {
 public:
  explicit Message(std::string_view bytes) : rest_(bytes) {}

  bool next() {
    if (rest_.empty()) return false;
    const std::uint64_t tag = varint();
    field = tag >> 3;
    if (!field) damaged();  // zeros, as a hole in a file has them
    bytes = {}, number = 0;
    is_number = (tag & 7) == 0;
    switch (tag & 7) {
      case 0:
        number = varint();
        break;
      case 1:
        take(8);
        break;
      case 2:
        bytes = take(varint());
        break;
      case 5:
        take(4);
        break;
      default:
        damaged();
    }
    return true;
  }

  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= std::uint64_t{byte & 0x7Fu} << shift;
      if (byte < 0x80) return value;
    }
    damaged();
  }

  bool done() const { return rest_.empty(); }

  std::uint64_t field = 0, number = 0;
  bool is_number = false;
  std::string_view bytes;  // of a text, a message or a packed list

 private:
  std::string_view take(std::uint64_t count) {
    if (count > rest_.size()) damaged();
    const std::string_view taken = rest_.substr(0, count);
    rest_.remove_prefix(count);
    return taken;
  }

  std::string_view rest_;
};

std::uint64_t decimal(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) damaged();
  return value;
}

void read_place(std::string_view entry, Initializer& result) {  // StringStringEntryProto
  std::string_view key, value;
  for (Message m(entry); m.next();) {
    if (m.field == 1) key = m.bytes;
    if (m.field == 2) value = m.bytes;
  }
  if (key == "location") result.file = value;
  if (key == "offset") result.offset = decimal(value);
  if (key == "length") result.length = decimal(value);
}

void read_tensor(std::string_view tensor, std::vector<Initializer>& results) {  // TensorProto
  Initializer result{};
  bool external = false;
  for (Message m(tensor); m.next();) {
    if (m.field == 1 && m.is_number) result.shape.push_back(static_cast<std::int64_t>(m.number));
    if (m.field == 1)
      for (Message dims(m.bytes); !dims.done();) result.shape.push_back(static_cast<std::int64_t>(dims.varint()));
    if (m.field == 2) result.type = static_cast<std::int32_t>(m.number);
    if (m.field == 8) result.name = m.bytes;
    if (m.field == 13) read_place(m.bytes, result);
    if (m.field == 14) external = m.number == 1;
  }
  if (!external) return;
  if (result.type == UNDEFINED || result.type == STRING) damaged();  // a text in memory is a pointer: none comes from a file
  results.push_back(std::move(result));
}

}  // namespace

std::vector<Initializer> external_initializers(std::span<const std::byte> model, const std::string& name) try {
  std::vector<Initializer> results;
  bool graphs = false, opsets = false;
  for (Message m({reinterpret_cast<const char*>(model.data()), model.size()}); m.next();) {
    opsets = opsets || m.field == 8;  // ModelProto.opset_import, which is written after it
    if (m.field != 7) continue;       // ModelProto.graph
    graphs = true;
    for (Message graph(m.bytes); graph.next();)
      if (graph.field == 5) read_tensor(graph.bytes, results);  // GraphProto.initializer
  }
  if (!graphs || !opsets) damaged();
  return results;
} catch (const Damaged&) {
  throw BundleError(name + " is damaged; export the bundle again");
}

}  // namespace headpool::detail
