// The kernels, compiled once for each instruction set (HEADPOOL_ISA names it); dispatch.cpp chooses.
//
// No template of the standard library here: the linker keeps one copy of each for the whole library, and it might be this
// one, with instructions that an older processor lacks.
#include "kernels.hpp"

#include <cmath>

#include "attend.hpp"
#include "simd.hpp"
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace headpool::HEADPOOL_ISA {
namespace {

// ---- Linear layers. A decode step is bound by reading w. Measured: one row of w at a time, in order, one vector a turn and a
// line ahead asked for (dispatch.cpp says which, and for which cache), reads at the memory's full speed; unrolled, or several
// rows side by side, no faster, and on some processors a fifth slower. Where the rows of x are more than the first-level cache
// holds, each row of w has to read them anew from the second: then rows of w side by side share what is read.

// sums[m] = x_m · w for COUNT rows of x; ONCE asks for lines of w as such that are read but once, which leaves the caches to
// others.
template <bool ONCE, size_t COUNT>
inline void dots(const float* x, const float* w, size_t K, float (&sums)[COUNT]) {
  Vec total[COUNT] = {};
  size_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    __builtin_prefetch(w + k + asking.floats_ahead, 0, ONCE ? 0 : 2);
    const Vec weight = load(w + k);
    for (size_t m = 0; m < COUNT; ++m) total[m] += weight * load(x + m * K + k);
  }
  for (size_t m = 0; m < COUNT; ++m) {
    sums[m] = sum(total[m]);
    for (size_t i = k; i < K; ++i) sums[m] += x[m * K + i] * w[i];
  }
}

// sums[r][m] = x_m · w_r for SIDE neighbouring rows of w, each as `dots` adds it up; asked for near, as lines are read from
// several places. What it brings stands in profiles/results (a batch of 4 beside other runtimes).
template <size_t SIDE, size_t COUNT>
inline void dots_beside(const float* x, const float* w, size_t K, float (&sums)[SIDE][COUNT]) {
  constexpr size_t NEAR = 128;
  Vec total[SIDE][COUNT] = {};
  size_t k = 0;
  for (; k + LANES <= K; k += LANES)
    for (size_t r = 0; r < SIDE; ++r) {
      __builtin_prefetch(w + r * K + k + NEAR, 0, 3);
      const Vec weight = load(w + r * K + k);
      for (size_t m = 0; m < COUNT; ++m) total[r][m] += weight * load(x + m * K + k);
    }
  for (size_t r = 0; r < SIDE; ++r)
    for (size_t m = 0; m < COUNT; ++m) {
      sums[r][m] = sum(total[r][m]);
      for (size_t i = k; i < K; ++i) sums[r][m] += x[m * K + i] * w[r * K + i];
    }
}

// ---- Quantised weights. Products of bytes are added up as integers within a block, where they are exact, and their sums as
// floats.

constexpr size_t AHEAD = 4096;  // bytes; an Intel Xeon is 2 % slower with half of it, Zen 4 as fast

// total += Σ of each four neighbours u · s
inline Int dot_bytes(Int total, Bytes u, Signed s) {
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)total, (__m512i)u, (__m512i)s);
#else
  const Short t = (Short)s;
  const Int even = (Int)(((Short)u & 255) * ((t << 8) >> 8));  // two products in each, at most 255 · 128: they fit
  const Int odd = (Int)((Short)((Unsigned)u >> 8) * (t >> 8));
  return total + ((even << 16) >> 16) + (even >> 16) + ((odd << 16) >> 16) + (odd >> 16);
#endif
}

// sums[m] += the group x[m] · q, COUNT rows of x, `stride` groups apart; scales of its blocks
template <size_t BITS, size_t COUNT>
inline void dot_group(const Group<BITS>* x, size_t stride, const uint8_t* q, const float* scales, Vec (&total)[COUNT]) {
  constexpr size_t PART = LANES * 4, BLOCK_LANES = BLOCK * BITS / 8 / 4;  // bytes of q in a vector; its lanes in a block
  for (size_t p = 0; p < GROUP_BYTES / PART; ++p) {
    Bytes packed;
    std::memcpy(&packed, q + p * PART, PART);
    const Vec scale = spread<BLOCK_LANES>(scales + p * LANES / BLOCK_LANES);
    for (size_t m = 0; m < COUNT; ++m) {
      const Group<BITS>& group = x[m * stride];
      Int sum = load_as<Int>(group.start + p * LANES);
      if constexpr (BITS == 4) {
        sum = dot_bytes(sum, packed & 15, load_as<Signed>(group.values[0] + p * PART));
        sum = dot_bytes(sum, packed >> 4, load_as<Signed>(group.values[1] + p * PART));
      } else {
        sum = dot_bytes(sum, packed, load_as<Signed>(group.values[0] + p * PART));
      }
      total[m] += __builtin_convertvector(sum, Vec) * (scale * load(group.scales + p * LANES));
    }
  }
}

template <size_t BITS, size_t COUNT>
inline void dots(const Group<BITS>* x, const uint8_t* q, const float* scales, size_t K, float (&sums)[COUNT]) {
  constexpr size_t BLOCKS = GROUP_BYTES * 8 / BITS / BLOCK;  // of a group
  const size_t bytes = K * BITS / 8, whole = bytes / GROUP_BYTES, stride = groups(K, BITS);
  Vec total[COUNT] = {};
  for (size_t g = 0; g < whole; ++g) {
    __builtin_prefetch(q + g * GROUP_BYTES + AHEAD);
    dot_group<BITS, COUNT>(x + g, stride, q + g * GROUP_BYTES, scales + g * BLOCKS, total);
  }
  if (const size_t rest = bytes - whole * GROUP_BYTES) {  // of a row that ends inside a group
    uint8_t last[GROUP_BYTES] = {};
    float its[BLOCKS] = {};
    for (size_t b = 0; b < rest / (BLOCK * BITS / 8); ++b) {
      std::memcpy(last + b * BLOCK * BITS / 8, q + whole * GROUP_BYTES + b * BLOCK * BITS / 8, BLOCK * BITS / 8);
      its[b] = scales[whole * BLOCKS + b];
    }
    dot_group<BITS, COUNT>(x + whole, stride, last, its, total);
  }
  for (size_t m = 0; m < COUNT; ++m) sums[m] = sum(total[m]);
}

template <size_t BITS>
void quantise_row(const float* from, size_t K, Group<BITS>* to) {
  constexpr size_t BLOCKS = GROUP_BYTES * 8 / BITS / BLOCK, BYTES = BLOCK * BITS / 8;
  std::memset(to, 0, groups(K, BITS) * sizeof *to);
  for (size_t b = 0; b < K / BLOCK; ++b, from += BLOCK) {
    Group<BITS>& group = to[b / BLOCKS];
    const size_t place = b % BLOCKS * BYTES;  // of the block in its group of q
    Vec most{}, nothing{};
    for (size_t k = 0; k < BLOCK; k += LANES) {
      const Vec x = load(from + k);
      most = max(most, max(x, -x));
      nothing += x * 0.0f;
    }
    const float zero = sum(nothing);  // or NaN, which makes all that reads the block NaN
    const float scale = zero == 0 ? largest(most) / 127 : zero, inverse = scale > 0 ? 1 / scale : 0;
    int8_t q[BLOCK] = {};
    for (size_t k = 0; inverse > 0 && k < BLOCK; ++k) q[k] = static_cast<int8_t>(std::nearbyint(from[k] * inverse));
    for (size_t k = 0; k < BLOCK; ++k) {
      const size_t byte = place + (BITS == 4 ? k / 2 : k);
      group.values[BITS == 4 ? k % 2 : 0][byte] = q[k];
      group.start[byte / 4] -= (1 << (BITS - 1)) * q[k];
    }
    for (size_t lane = place / 4; lane < (place + BYTES) / 4; ++lane) group.scales[lane] = scale;
  }
}

void quantise(const float* from, size_t K, size_t bits, void* to) {
  bits == 4 ? quantise_row(from, K, static_cast<Group<4>*>(to)) : quantise_row(from, K, static_cast<Group<8>*>(to));
}

template <size_t BITS, size_t COUNT>
inline void dots(const Rows& x, size_t m, const Matrix& w, size_t n, size_t K, float (&sums)[COUNT]) {
  if constexpr (BITS == 0) {
    const float *from = x.floats + m * K, *weights = static_cast<const float*>(w.data) + n * K;
    asking.once ? dots<true>(from, weights, K, sums) : dots<false>(from, weights, K, sums);
  } else {
    const auto q = static_cast<const uint8_t*>(w.data) + n * row_bytes(K, BITS);
    dots<BITS, COUNT>(static_cast<const Group<BITS>*>(x.quantised) + m * groups(K, BITS), q, w.scales + n * (K / BLOCK), K,
                      sums);
  }
}

// put(n, m, x_m · w_n) for rows n0 to n1 of w and all M rows of x
template <size_t BITS, class Put>
inline void products(const Rows& x, const Matrix& w, size_t n0, size_t n1, size_t M, size_t K, const Put& put) {
  size_t n = n0;
  if constexpr (BITS == 0 && LANES == 16) {  // whose 32 registers hold so many sums
    constexpr size_t SIDE = 4, FIRST_LEVEL = 32 << 10;
    if (M > 1 && M * K * sizeof(float) > FIRST_LEVEL && !asking.once)
      for (; n + SIDE <= n1; n += SIDE)
        in_fours(M, [&]<size_t COUNT>(size_t m) {
          float sums[SIDE][COUNT];
          dots_beside(x.floats + m * K, static_cast<const float*>(w.data) + n * K, K, sums);
          for (size_t r = 0; r < SIDE; ++r)
            for (size_t i = 0; i < COUNT; ++i) put(n + r, m + i, sums[r][i]);
        });
  }
  for (; n < n1; ++n)
    in_fours(M, [&]<size_t COUNT>(size_t m) {
      float sums[COUNT];
      dots<BITS, COUNT>(x, m, w, n, K, sums);
      for (size_t i = 0; i < COUNT; ++i) put(n, m + i, sums[i]);
    });
}

// f<bits>(), chosen once for many rows: asked at each, it cost a hundredth
template <class F>
inline void by_bits(size_t bits, const F& f) {
  if (bits == 4)
    f.template operator()<4>();
  else if (bits == 8)
    f.template operator()<8>();
  else
    f.template operator()<0>();
}

void linear(const Linear& a, size_t n0, size_t n1) {
  by_bits(a.w.bits, [&]<size_t BITS> {
    products<BITS>(a.x, a.w, n0, n1, a.M, a.K, [&](size_t n, size_t m, float value) {
      if (a.bias) value += a.bias[n];
      if (a.residual) value += a.residual[m * a.N + n];
      a.y[m * a.N + n] = value;
    });
  });
}

// e^x that stays finite: `exp` itself, for the softmax, never meets numbers so large. NaN stays NaN.
inline Vec exp_bounded(Vec x) {
  const Vec high = splat(88.0f);
  return exp(x > high ? high : x);
}

inline Vec tanh(Vec x) { return 1.0f - 2.0f / (exp_bounded(x + x) + 1.0f); }

inline Vec act(Vec x, Activation kind) {
  switch (kind) {
    case Activation::relu:
      return x < 0.0f ? Vec{} : x;  // NaN stays NaN
    case Activation::silu:
      return x / (1.0f + exp_bounded(-x));
    case Activation::sigmoid:
      return 1.0f / (1.0f + exp_bounded(-x));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::gelu:
      for (size_t i = 0; i < LANES; ++i) x[i] *= 0.5f * (1 + std::erf(x[i] * 0.70710678f));
      return x;
    case Activation::identity:
      break;
  }
  return x;
}

void activate(const float* gate, float* up, size_t count, Activation kind) {
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) store(up + i, act(load(gate + i), kind) * load(up + i));
  if (i < count) store_part(up + i, act(load_part(gate + i, count - i), kind) * load_part(up + i, count - i), count - i);
}

template <size_t BITS>
void gated_of(const Gated& a, size_t n0, size_t n1) {
  constexpr size_t WIDTH = 32;  // outputs worked out before they are activated together
  float gate[FEW_ROWS][WIDTH], up[FEW_ROWS][WIDTH];
  for (size_t start = n0; start < n1; start += WIDTH) {
    const size_t width = n1 - start < WIDTH ? n1 - start : WIDTH;
    products<BITS>(a.x, a.gate, start, start + width, a.M, a.K,
                   [&](size_t n, size_t m, float value) { gate[m][n - start] = a.gate_bias ? value + a.gate_bias[n] : value; });
    products<BITS>(a.x, a.up, start, start + width, a.M, a.K,
                   [&](size_t n, size_t m, float value) { up[m][n - start] = a.up_bias ? value + a.up_bias[n] : value; });
    for (size_t m = 0; m < a.M; ++m) {
      activate(gate[m], up[m], width, a.activation);
      copy(a.y + m * a.N + start, up[m], width);
    }
  }
}

void gated(const Gated& a, size_t n0, size_t n1) {
  by_bits(a.gate.bits, [&]<size_t BITS> { gated_of<BITS>(a, n0, n1); });
}

void normalise(const Norm& norm, const float* from, float* to) {
  const size_t K = norm.K;
  Vec squares{};
  size_t k = 0;
  for (; k + LANES <= K; k += LANES) squares += load(from + k) * load(from + k);
  float total = sum(squares);
  for (; k < K; ++k) total += from[k] * from[k];
  const float factor = 1 / std::sqrt(total / K + norm.epsilon);
  for (k = 0; k < K; ++k) to[k] = from[k] * factor * (norm.offset + norm.weight[k]);
}

}  // namespace

#define HEADPOOL_TEXT_(x) #x
#define HEADPOOL_TEXT(x) HEADPOOL_TEXT_(x)
extern const Kernels table;
const Kernels table{
    HEADPOOL_TEXT(HEADPOOL_ISA), linear, gated, activate, normalise, quantise, rotate, keep, attend, scratch_floats};

}  // namespace headpool::HEADPOOL_ISA
