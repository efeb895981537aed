// Rows of a cache as they are stored (CacheType), read and written as floats.
//
// Each kind has bytes(size) of a row of `size` channels, load(row, d) of LANES channels from d on, load_part(row, d, count),
// keep(from, size, row), FLOATS: whether they are stored as such, and SCALED: whether what it loads is still to be multiplied
// by scale(row, size).
#pragma once

#include <cmath>

#include "kernels.hpp"
#include "simd.hpp"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace headpool::HEADPOOL_ISA {

#if defined(__AVX512F__)
constexpr __mmask16 ALL = 0xFFFF;  // of a masked conversion: the compiler drops it, and gcc 12 warns of those without
#endif

struct Fp32 {
  static constexpr bool FLOATS = true, SCALED = false;
  static size_t bytes(size_t size) { return cache_row_bytes(CacheType::fp32, size); }
  static Vec load(const char* row, size_t d) { return load_as<Vec>(row + d * sizeof(float)); }
  static Vec load_part(const char* row, size_t d, size_t count) {
    Vec v{};
    std::memcpy(&v, row + d * sizeof(float), count * sizeof(float));
    return v;
  }
  static void keep(const float* from, size_t size, char* row) { std::memcpy(row, from, size * sizeof(float)); }
};

struct Fp16 {
  using Halves = uint16_t __attribute__((vector_size(LANES * sizeof(uint16_t))));
  static constexpr bool FLOATS = false, SCALED = false;
  static size_t bytes(size_t size) { return cache_row_bytes(CacheType::fp16, size); }
  static Vec load(const char* row, size_t d) { return widen(load_as<Halves>(row + d * sizeof(uint16_t))); }
  static Vec load_part(const char* row, size_t d, size_t count) {
    Halves h{};
    std::memcpy(&h, row + d * sizeof(uint16_t), count * sizeof(uint16_t));
    return widen(h);
  }
  static void keep(const float* from, size_t size, char* row) {
    size_t d = 0;
    for (; d + LANES <= size; d += LANES) {
      const Halves h = narrow(HEADPOOL_ISA::load(from + d));
      std::memcpy(row + d * sizeof(uint16_t), &h, sizeof h);
    }
    const Halves h = narrow(HEADPOOL_ISA::load_part(from + d, size - d));
    std::memcpy(row + d * sizeof(uint16_t), &h, (size - d) * sizeof(uint16_t));
  }

 private:
#if defined(__AVX512F__)
  static Vec widen(Halves h) { return (Vec)_mm512_maskz_cvtph_ps(ALL, (__m256i)h); }
  static Halves narrow(Vec v) { return (Halves)_mm512_maskz_cvtps_ph(ALL, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
  static Vec widen(Halves h) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
  static Halves narrow(Vec v) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
  // Exponents have a bias of 15 where floats have 127; the largest one stands for infinity and NaN.
  static Vec widen(Halves h) {
    const Int bits = __builtin_convertvector(h, Int), magnitude = (bits & 0x7FFF) << 13;
    const Int scaled = (Int)((Vec)magnitude * 0x1p112f), endless = (magnitude >= 0x0F800000) & 0x7F800000;
    return (Vec)(scaled | endless | ((bits & 0x8000) << 16));
  }
  static Halves narrow(Vec v) {
    const Int bits = (Int)v, magnitude = bits & 0x7FFFFFFF;
    const Int odd = (magnitude >> 13) & 1, normal = (magnitude - (112 << 23) + 0x0FFF + odd) >> 13;  // to the nearest, even
    const Int small = (Int)((Vec)magnitude + 0.5f) - 0x3F000000;  // the sum is rounded to steps of 2⁻²⁴
    const Int large = magnitude > 0x7F800000 ? Int{} + 0x7E00 : Int{} + 0x7C00;
    const Int half = magnitude < 0x38800000 ? small : magnitude < 0x47800000 ? normal : large;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Halves);
  }
#endif
};

// A row's values are whole numbers from −127 to 127, times the fp32 scale after them.
struct Int8 {
  using Octets = int8_t __attribute__((vector_size(LANES)));
  static constexpr bool FLOATS = false, SCALED = true;
  static size_t bytes(size_t size) { return cache_row_bytes(CacheType::int8, size); }
  static Vec load(const char* row, size_t d) { return widen(load_as<Octets>(row + d)); }
  static Vec load_part(const char* row, size_t d, size_t count) {
    Octets q{};
    std::memcpy(&q, row + d, count);
    return widen(q);
  }
  static float scale(const char* row, size_t size) { return load_as<float>(row + size); }

  // To the nearest multiple of the largest magnitude / 127; what is not finite makes the scale NaN, and so the row. A row whose
  // scale would lose digits, being that small, is zero.
  static void keep(const float* from, size_t size, char* row) {
    Vec most{}, nothing{};
    for (size_t d = 0; d < size; d += LANES) {
      const Vec x = HEADPOOL_ISA::load_part(from + d, size - d < LANES ? size - d : LANES);
      most = max(most, max(x, -x));
      nothing += x * 0.0f;  // 0, or NaN
    }
    const float zero = sum(nothing);
    float scale = zero == 0 ? largest(most) / 127 : zero;
    if (scale < 0x1p-126f) scale = 0;
    for (size_t d = 0; d < size; ++d)
      row[d] = scale > 0 ? static_cast<char>(static_cast<int8_t>(std::nearbyint(from[d] / scale))) : 0;
    std::memcpy(row + size, &scale, sizeof scale);
  }

 private:
  static Vec widen(Octets q) { return __builtin_convertvector(integers(q), Vec); }
#if defined(__AVX512F__)
  static Int integers(Octets q) { return (Int)_mm512_maskz_cvtepi8_epi32(ALL, (__m128i)q); }
#elif defined(__AVX2__)
  static Int integers(Octets q) { return (Int)_mm256_cvtepi8_epi32(_mm_loadu_si64(&q)); }
#else
  static Int integers(Octets q) { return __builtin_convertvector(q, Int); }
#endif
};

// f<Kind>() of a type
template <class F>
inline void by_type(CacheType type, const F& f) {
  if (type == CacheType::int8)
    f.template operator()<Int8>();
  else if (type == CacheType::fp16)
    f.template operator()<Fp16>();
  else
    f.template operator()<Fp32>();
}

}  // namespace headpool::HEADPOOL_ISA
