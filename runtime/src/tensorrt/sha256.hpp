#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace headpool::detail {

// The SHA-256 of `bytes` (FIPS 180-4), in 64 lower-case hexadecimal digits.
std::string sha256(std::span<const std::byte> bytes);

}  // namespace headpool::detail
