// Vectors of the instruction set this file is compiled for, by the compiler's own vector extension.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace headpool::HEADPOOL_ISA {

#if defined(__AVX512F__)
constexpr size_t LANES = 16;
#elif defined(__AVX2__)
constexpr size_t LANES = 8;
#else
constexpr size_t LANES = 4;
#endif

using Vec = float __attribute__((vector_size(LANES * sizeof(float))));
using Int = int32_t __attribute__((vector_size(LANES * sizeof(int32_t))));

using Bytes = uint8_t __attribute__((vector_size(LANES * 4)));
using Signed = int8_t __attribute__((vector_size(LANES * 4)));
using Short = int16_t __attribute__((vector_size(LANES * 4)));
using Unsigned = uint16_t __attribute__((vector_size(LANES * 4)));

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec load_part(const float* p, size_t count) {
  Vec v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

inline void store_part(float* p, Vec v, size_t count) { std::memcpy(p, &v, count * sizeof(float)); }

inline Vec splat(float x) { return x - Vec{}; }

// Each of the first LANES / TIMES floats TIMES times.
template <size_t TIMES>
inline Vec spread(const float* p) {
  float all[LANES];
  for (size_t i = 0; i < LANES; ++i) all[i] = p[i / TIMES];
  return load(all);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

using Four = float __attribute__((vector_size(16)));
using Eight = float __attribute__((vector_size(32)));

// f over all lanes, the vector halved each time
template <class F>
inline float reduce(Four v, const F& f) {
  return f(f(v[0], v[1]), f(v[2], v[3]));
}

template <class F>
inline float reduce(Eight v, const F& f) {
  Four halves[2];
  std::memcpy(halves, &v, sizeof v);
  return reduce(f(halves[0], halves[1]), f);
}

#if defined(__AVX512F__)
template <class F>
inline float reduce(Vec v, const F& f) {
  Eight halves[2];
  std::memcpy(halves, &v, sizeof v);
  return reduce(f(halves[0], halves[1]), f);
}
#endif

inline float sum(Vec v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}

inline float largest(Vec v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x to about 2 ulp for x ≤ 88; 0 below −87. Reduction by powers of two, then the minimax polynomial of Cephes' expf.
inline Vec exp(Vec x) {
  const Vec low = splat(-87.0f);
  const auto tiny = x < low;
  x = tiny ? low : x;
  const Vec shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5·2²³ rounds to the nearest whole number
  const Vec whole = shifted - 12582912.0f;
  const Vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec y = p * r * r + r + 1.0f;
  const Int power = (__builtin_convertvector(whole, Int) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return tiny ? Vec{} : y * scale;
}

#define HEADPOOL_UNROLL _Pragma("GCC unroll 16")

// In each 2W × 2W block of the rows in `a`, swap the off-diagonal W × W blocks; FIRST and SECOND are the two shuffles.
template <size_t W, class Pick>
[[gnu::always_inline]] inline void swap_blocks(Vec (&a)[LANES], const Pick& pick) {
  HEADPOOL_UNROLL
  for (size_t i = 0; i < LANES; ++i)
    if (!(i & W)) pick(a[i], a[i | W]);
}

// Rows → columns.
[[gnu::always_inline]] inline void transpose(Vec (&a)[LANES]) {
#define HEADPOOL_SWAP(W, FIRST, SECOND)                                 \
  swap_blocks<W>(a, [](Vec& x, Vec& y) __attribute__((always_inline)) { \
    const Vec first = __builtin_shufflevector(x, y, FIRST);             \
    y = __builtin_shufflevector(x, y, SECOND);                          \
    x = first;                                                          \
  })
#define HEADPOOL_LIST(...) __VA_ARGS__
#if defined(__AVX512F__)
  HEADPOOL_SWAP(8, HEADPOOL_LIST(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                HEADPOOL_LIST(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
  HEADPOOL_SWAP(4, HEADPOOL_LIST(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                HEADPOOL_LIST(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
  HEADPOOL_SWAP(2, HEADPOOL_LIST(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                HEADPOOL_LIST(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  HEADPOOL_SWAP(1, HEADPOOL_LIST(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                HEADPOOL_LIST(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
#elif defined(__AVX2__)
  HEADPOOL_SWAP(4, HEADPOOL_LIST(0, 1, 2, 3, 8, 9, 10, 11), HEADPOOL_LIST(4, 5, 6, 7, 12, 13, 14, 15));
  HEADPOOL_SWAP(2, HEADPOOL_LIST(0, 1, 8, 9, 4, 5, 12, 13), HEADPOOL_LIST(2, 3, 10, 11, 6, 7, 14, 15));
  HEADPOOL_SWAP(1, HEADPOOL_LIST(0, 8, 2, 10, 4, 12, 6, 14), HEADPOOL_LIST(1, 9, 3, 11, 5, 13, 7, 15));
#else
  HEADPOOL_SWAP(2, HEADPOOL_LIST(0, 1, 4, 5), HEADPOOL_LIST(2, 3, 6, 7));
  HEADPOOL_SWAP(1, HEADPOOL_LIST(0, 4, 2, 6), HEADPOOL_LIST(1, 5, 3, 7));
#endif
#undef HEADPOOL_SWAP
#undef HEADPOOL_LIST
}

inline void fill(float* to, size_t count, float value) {
  for (size_t i = 0; i < count; ++i) to[i] = value;
}

inline void copy(float* to, const float* from, size_t count) { std::memcpy(to, from, count * sizeof(float)); }

// f<4>(m), and f<rest>(m) at the end, so that all M rows are covered
template <class F>
inline void in_fours(size_t M, const F& f) {
  size_t m = 0;
  for (; m + 4 <= M; m += 4) f.template operator()<4>(m);
  if (M - m == 3) f.template operator()<3>(m);
  if (M - m == 2) f.template operator()<2>(m);
  if (M - m == 1) f.template operator()<1>(m);
}

}  // namespace headpool::HEADPOOL_ISA
