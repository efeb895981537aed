#include "guard.hpp"

#include <algorithm>

namespace headpool {
namespace {

std::string without_controls(std::string text) {
  std::ranges::replace_if(text, [](char c) { return (c >= 0 && c < ' ') || c == 0x7F; }, ' ');
  return text;
}

}  // namespace

Error::Error(ErrorCode code, const std::string& message) : std::runtime_error(without_controls(message)), code_(code) {}

namespace detail {

std::string one_line(const std::string& text) {
  std::string line;
  for (const char c : text.substr(0, 400)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte > ' ')
      line += byte < 0x7F ? c : '?';  // a graph's names may be anything, and may be cut short
    else if (!line.empty() && line.back() != ' ')
      line += ' ';
  }
  return line;
}

bool lacks_memory(std::string_view message) {
  return message.find("bad_alloc") != message.npos || message.find("Failed to allocate memory") != message.npos;
}

}  // namespace detail
}  // namespace headpool
