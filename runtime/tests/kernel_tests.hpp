// What the tests of the kernels share: random numbers, comparisons, and every instruction set's table.
//
// Vectors have the exact size, so that a sanitizer (scripts/sanitizers) sees every access beside them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../ops/kernels.hpp"

namespace headpool {
namespace plain {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512vnni {
extern const Kernels table;
}
#endif
}  // namespace headpool

namespace headpool::tests {

using Floats = std::vector<float>;

inline std::mt19937 random_bits(1);
inline long checks = 0, failures = 0;

inline size_t pick(size_t from, size_t to) { return std::uniform_int_distribution<size_t>(from, to)(random_bits); }

inline size_t one_of(const std::vector<size_t>& choices) { return choices[pick(0, choices.size() - 1)]; }

inline Floats normal(size_t count, float deviation = 1) {
  std::normal_distribution<float> draw(0, deviation);
  Floats values(count);
  for (float& value : values) value = draw(random_bits);
  return values;
}

// A pointer that is null where there is nothing.
inline const float* data(const Floats& values) { return values.empty() ? nullptr : values.data(); }

inline void expect(bool holds, const std::string& what) {
  ++checks;
  if (!holds && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

inline void close(double actual, double expected, double tolerance, const std::string& what) {
  if (std::abs(actual - expected) <= tolerance)
    ++checks;
  else
    expect(false, what + ": " + std::to_string(actual) + ", not " + std::to_string(expected));
}

// "linear of 3, 4" to say which case failed
inline std::string named(std::string text, std::initializer_list<size_t> numbers) {
  const char* before = " of ";
  for (const size_t number : numbers) text += before + std::to_string(number), before = ", ";
  return text;
}

void test_attention(const Kernels& kernels);  // attention_kernels.cpp

}  // namespace headpool::tests
