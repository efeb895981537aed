// Logits in half precision as floats.
#pragma once

#include <bit>
#include <cstring>

#include "manifest.hpp"

namespace headpool::detail {

// IEEE binary16, whose exponents have a bias of 15 where floats have 127. Without branches, so that loops become vectors.
inline float from_half(std::uint16_t half) {
  const std::uint32_t magnitude = (half & 0x7FFFu) << 13, sign = (half & 0x8000u) << 16;
  const auto scaled = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(scaled | (magnitude >= 0x0F800000u ? 0x7F800000u : 0u) | sign);  // infinities and NaN
}

inline float from_bfloat16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

// `count` values at `from`, which lie aligned, to `to`.
inline void to_floats(DataType type, const std::byte* from, std::size_t count, float* to) {
  const auto* bits = reinterpret_cast<const std::uint16_t*>(from);
  if (type == DataType::fp32)
    std::memcpy(to, from, count * sizeof(float));
  else if (type == DataType::fp16)
    for (std::size_t i = 0; i < count; ++i) to[i] = from_half(bits[i]);
  else
    for (std::size_t i = 0; i < count; ++i) to[i] = from_bfloat16(bits[i]);
}

}  // namespace headpool::detail
