// Vectors of the instruction set this file is compiled for, by the compiler's own vector extension.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// As many as there are, of at least one.
inline Vec load_some(const float* p, size_t count) { return count < LANES ? load_part(p, count) : load(p); }

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

// Of two rows whose numbers differ by W: in each 2W lanes W of the one and then W of the other, the first ones and the second.
#define HEADPOOL_PICK(NAME, W, ...) \
  [[gnu::always_inline]] inline Vec NAME##W(Vec x, Vec y) { return __builtin_shufflevector(x, y, __VA_ARGS__); }
#if defined(__AVX512F__)
HEADPOOL_PICK(first, 8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
HEADPOOL_PICK(second, 8, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
HEADPOOL_PICK(first, 4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
HEADPOOL_PICK(second, 4, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
HEADPOOL_PICK(first, 2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
HEADPOOL_PICK(second, 2, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
HEADPOOL_PICK(first, 1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
HEADPOOL_PICK(second, 1, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#elif defined(__AVX2__)
HEADPOOL_PICK(first, 4, 0, 1, 2, 3, 8, 9, 10, 11)
HEADPOOL_PICK(second, 4, 4, 5, 6, 7, 12, 13, 14, 15)
HEADPOOL_PICK(first, 2, 0, 1, 8, 9, 4, 5, 12, 13)
HEADPOOL_PICK(second, 2, 2, 3, 10, 11, 6, 7, 14, 15)
HEADPOOL_PICK(first, 1, 0, 8, 2, 10, 4, 12, 6, 14)
HEADPOOL_PICK(second, 1, 1, 9, 3, 11, 5, 13, 7, 15)
#else
HEADPOOL_PICK(first, 2, 0, 1, 4, 5)
HEADPOOL_PICK(second, 2, 2, 3, 6, 7)
HEADPOOL_PICK(first, 1, 0, 4, 2, 6)
HEADPOOL_PICK(second, 1, 1, 5, 3, 7)
#endif
#undef HEADPOOL_PICK

// f(i, W, first, second) for each such pair of rows i and i + W, the largest W first.
#define HEADPOOL_STEP(W)                                                                               \
  f.template operator()<W>([](Vec x, Vec y) __attribute__((always_inline)) { return first##W(x, y); }, \
                           [](Vec x, Vec y) __attribute__((always_inline)) { return second##W(x, y); })
template <class F>
[[gnu::always_inline]] inline void by_halves(const F& f) {
#if defined(__AVX512F__)
  HEADPOOL_STEP(8);
#endif
#if defined(__AVX2__)
  HEADPOOL_STEP(4);
#endif
  HEADPOOL_STEP(2);
  HEADPOOL_STEP(1);
}
#undef HEADPOOL_STEP

// Of LANES / C rows, in elements of C lanes: rows → columns.
template <size_t C = 1>
[[gnu::always_inline]] inline void transpose(Vec (&a)[LANES / C]) {
  by_halves([&]<size_t W>(const auto& first, const auto& second) __attribute__((always_inline)) {
    if constexpr (W >= C) {
      HEADPOOL_UNROLL
      for (size_t i = 0; i < LANES / C; ++i)
        if (!(i & W / C)) {
          const Vec x = a[i], y = a[i | W / C];
          a[i] = first(x, y), a[i | W / C] = second(x, y);
        }
    }
  });
}

// Of C rows, in elements of C lanes: lane c of each element of the result is the sum of that element of row c. What is in `a`
// then is of no use.
template <size_t C>
[[gnu::always_inline]] inline Vec element_sums(Vec* a) {
  by_halves([&]<size_t W>(const auto& first, const auto& second) __attribute__((always_inline)) {
    if constexpr (W < C) {
      HEADPOOL_UNROLL
      for (size_t i = 0; i < W; ++i) a[i] = first(a[i], a[i + W]) + second(a[i], a[i + W]);
    }
  });
  return a[0];
}

// In elements of C lanes: f over the lanes of each, in all of them.
template <size_t C, class F>
[[gnu::always_inline]] inline Vec fold(Vec v, const F& f) {
  by_halves([&]<size_t W>(const auto& first, const auto& second) __attribute__((always_inline)) {
    if constexpr (W < C) v = f(first(v, v), second(v, v));
  });
  return v;
}

// C floats, again and again.
template <size_t C>
[[gnu::always_inline]] inline Vec repeat(const float* p) {
  if constexpr (C == LANES) return load(p);
  if constexpr (C == 1) return splat(*p);
  if constexpr (C == 2) {
    using Pairs = int64_t __attribute__((vector_size(sizeof(Vec))));
    return (Vec)(Pairs{} + load_as<int64_t>(p));
  }
#if defined(__AVX512F__)
  if constexpr (C == 4) return (Vec)_mm512_maskz_broadcast_f32x4(0xFFFF, load_as<__m128>(p));
  if constexpr (C == 8) return (Vec)_mm512_maskz_broadcast_f64x4(0xFF, load_as<__m256d>(p));
#elif defined(__AVX2__)
  if constexpr (C == 4) return (Vec)_mm256_broadcast_ps((const __m128*)p);
#endif
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

// f<W, COUNT>(m) for COUNT panels of W rows from the m-th on, until all M are covered: of WIDEST rows, and where at most three
// quarters of that are left, of half as many. The last one may reach past M.
template <size_t WIDEST, size_t W = WIDEST, class F>
inline void in_panels(size_t M, const F& f, size_t m = 0) {
  const size_t count = (M - m + (W - 1) / 4) / W;
  if constexpr (W == WIDEST)
    in_fours(count, [&]<size_t COUNT>(size_t panel) { f.template operator()<W, COUNT>(panel * W); });
  else if (count)
    f.template operator()<W, 1>(m);
  if constexpr (W > 1)
    if (m + count * W < M) in_panels<WIDEST, W / 2>(M, f, m + count * W);
}

}  // namespace headpool::HEADPOOL_ISA
