#include "guard.hpp"

namespace headpool::detail {

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

}  // namespace headpool::detail
