// The kernels, compiled once for each instruction set (HEADPOOL_ISA names it); dispatch.cpp chooses.
//
// No template of the standard library here: the linker keeps one copy of each for the whole library, and it might be this
// one, with instructions that an older processor lacks.
#include "kernels.hpp"

#include <cmath>

#include "simd.hpp"
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace headpool::HEADPOOL_ISA {
namespace {

inline void fill(float* to, size_t count, float value) {
  for (size_t i = 0; i < count; ++i) to[i] = value;
}

inline void copy(float* to, const float* from, size_t count) { std::memcpy(to, from, count * sizeof(float)); }

// ---- Linear layers. A decode step is bound by reading w. Measured: one row of w at a time, in order, one vector a turn and
// the line 2 kB ahead asked for, reads at the memory's full speed; unrolled, or several rows side by side, a fifth slower.

constexpr size_t AHEAD = 512;  // floats

// sums[m] = x_m · w for COUNT rows of x
template <size_t COUNT>
inline void dots(const float* x, const float* w, size_t K, float (&sums)[COUNT]) {
  Vec total[COUNT] = {};
  size_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    __builtin_prefetch(w + k + AHEAD);
    const Vec weight = load(w + k);
    for (size_t m = 0; m < COUNT; ++m) total[m] += weight * load(x + m * K + k);
  }
  for (size_t m = 0; m < COUNT; ++m) {
    sums[m] = sum(total[m]);
    for (size_t i = k; i < K; ++i) sums[m] += x[m * K + i] * w[i];
  }
}

// ---- Quantised weights. Products of bytes are added up as integers within a block, where they are exact, and their sums as
// floats.

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
    __builtin_prefetch(q + g * GROUP_BYTES + AHEAD * sizeof(float));
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

// f<4>(m), and f<rest>(m) at the end, so that all M rows are covered
template <class F>
inline void in_fours(size_t M, const F& f) {
  size_t m = 0;
  for (; m + 4 <= M; m += 4) f.template operator()<4>(m);
  if (M - m == 3) f.template operator()<3>(m);
  if (M - m == 2) f.template operator()<2>(m);
  if (M - m == 1) f.template operator()<1>(m);
}

template <size_t BITS, size_t COUNT>
inline void dots(const Rows& x, size_t m, const Matrix& w, size_t n, size_t K, float (&sums)[COUNT]) {
  if constexpr (BITS == 0) {
    dots<COUNT>(x.floats + m * K, static_cast<const float*>(w.data) + n * K, K, sums);
  } else {
    const auto q = static_cast<const uint8_t*>(w.data) + n * row_bytes(K, BITS);
    dots<BITS, COUNT>(static_cast<const Group<BITS>*>(x.quantised) + m * groups(K, BITS), q, w.scales + n * (K / BLOCK), K,
                      sums);
  }
}

// put(m, x_m · w_n) for all M rows of x
template <size_t BITS, class Put>
inline void row(const Rows& x, const Matrix& w, size_t n, size_t M, size_t K, const Put& put) {
  in_fours(M, [&]<size_t COUNT>(size_t m) {
    float sums[COUNT];
    dots<BITS, COUNT>(x, m, w, n, K, sums);
    for (size_t i = 0; i < COUNT; ++i) put(m + i, sums[i]);
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
    for (size_t n = n0; n < n1; ++n)
      row<BITS>(a.x, a.w, n, a.M, a.K, [&](size_t m, float value) {
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
    for (size_t i = 0; i < width; ++i) {
      const float bias = a.gate_bias ? a.gate_bias[start + i] : 0;
      row<BITS>(a.x, a.gate, start + i, a.M, a.K, [&](size_t m, float value) { gate[m][i] = value + bias; });
    }
    for (size_t i = 0; i < width; ++i) {
      const float bias = a.up_bias ? a.up_bias[start + i] : 0;
      row<BITS>(a.x, a.up, start + i, a.M, a.K, [&](size_t m, float value) { up[m][i] = value + bias; });
    }
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

// ---- Attention

void rotate(float* to, const float* from, const float* cos, const float* sin, size_t D, size_t rotary) {
  const size_t half = rotary / 2;
  for (size_t i = 0; i < half; ++i) {
    const float x = from[i], y = from[i + half];
    to[i] = x * cos[i] - y * sin[i];
    to[i + half] = y * cos[i] + x * sin[i];
  }
  if (to != from) std::memcpy(to + rotary, from + rotary, (D - rotary) * sizeof(float));
}

constexpr size_t SPAN = 64;  // cache rows worked on at a time: their keys, transposed, stay in the first-level cache
constexpr size_t WIDE = SPAN / LANES;
constexpr float NOTHING = -__builtin_inff();

// The cache lines that will be read next, asked for a few at a time between the arithmetic, so that memory never waits for
// it: the values of this block, then the keys of the next. Asking past the end of the cache does no harm.
class Ahead {
 public:
  Ahead(const float* values, size_t count, const float* keys, size_t then)
      : at_(values), end_(values + count), keys_(keys), keys_end_(keys + then) {}

  void ask(size_t lines) {
    for (size_t i = 0; i < lines; ++i, at_ += LINE) {
      if (at_ >= end_) {
        if (end_ == keys_end_) return;
        at_ = keys_, end_ = keys_end_;
      }
      __builtin_prefetch(at_, 0, 2);  // into the second level: the first holds what is worked on
    }
  }

 private:
  static constexpr size_t LINE = 64 / sizeof(float);
  const float *at_, *end_, *keys_, *keys_end_;
};

// to[d][i] = keys[i][d] for `count` ≤ SPAN keys; columns past `count` are 0.
inline void transpose_keys(const float* keys, size_t count, size_t D, float* to, Ahead& ahead) {
  if (count < SPAN) fill(to, D * SPAN, 0);
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    size_t d = 0;
    for (; d + LANES <= D; d += LANES) {
      ahead.ask(LANES / 2);
      transpose(keys + i * D + d, D, to + d * SPAN + i, SPAN);
    }
    for (; d < D; ++d)
      for (size_t j = i; j < i + LANES; ++j) to[d * SPAN + j] = keys[j * D + d];
  }
  for (; i < count; ++i)
    for (size_t d = 0; d < D; ++d) to[d * SPAN + i] = keys[i * D + d];
}

// scores[m][SPAN] = query[m] · keys, COUNT rows and COLUMNS vectors of keys at a time, held in registers
template <size_t COUNT, size_t COLUMNS>
inline void score_tile(const float* query, const float* keys, size_t D, float* scores, Ahead& ahead) {
  Vec total[COUNT][COLUMNS] = {};
  for (size_t d = 0; d < D; ++d) {
    ahead.ask(2);
    Vec key[COLUMNS];
    for (size_t j = 0; j < COLUMNS; ++j) key[j] = load(keys + d * SPAN + j * LANES);
    for (size_t m = 0; m < COUNT; ++m) {
      const Vec q = splat(query[m * D + d]);
      for (size_t j = 0; j < COLUMNS; ++j) total[m][j] += q * key[j];
    }
  }
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) store(scores + m * SPAN + j * LANES, total[m][j]);
}

template <size_t COUNT>
inline void score_rows(const float* query, const float* keys, size_t D, float* scores, Ahead& ahead) {
  constexpr size_t COLUMNS = LANES == 16 ? 4 : 2;  // 4 × 4 + 4 of 32 registers, 4 × 2 + 2 of 16
  static_assert(WIDE % COLUMNS == 0);
  for (size_t j = 0; j < WIDE; j += COLUMNS) score_tile<COUNT, COLUMNS>(query, keys + j * LANES, D, scores + j * LANES, ahead);
}

// output[m] += Σ scores[m][i] · values[i], COUNT rows and COLUMNS vectors of channels at a time
template <size_t COUNT, size_t COLUMNS>
inline void value_tile(const float* scores, const float* values, size_t count, size_t Dv, float* output, Ahead& ahead) {
  Vec total[COUNT][COLUMNS];
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) total[m][j] = load(output + m * Dv + j * LANES);
  for (size_t i = 0; i < count; ++i) {
    ahead.ask(4);
    Vec value[COLUMNS];
    for (size_t j = 0; j < COLUMNS; ++j) value[j] = load(values + i * Dv + j * LANES);
    for (size_t m = 0; m < COUNT; ++m) {
      const Vec p = splat(scores[m * SPAN + i]);
      for (size_t j = 0; j < COLUMNS; ++j) total[m][j] += p * value[j];
    }
  }
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) store(output + m * Dv + j * LANES, total[m][j]);
}

template <size_t COUNT>
inline void value_rows(const float* scores, const float* values, size_t count, size_t Dv, float* output, Ahead& ahead) {
  constexpr size_t COLUMNS = LANES == 16 ? 4 : 2;
  size_t d = 0;
  for (; d + COLUMNS * LANES <= Dv; d += COLUMNS * LANES)
    value_tile<COUNT, COLUMNS>(scores, values + d, count, Dv, output + d, ahead);
  for (; d + LANES <= Dv; d += LANES) value_tile<COUNT, 1>(scores, values + d, count, Dv, output + d, ahead);
  if (d == Dv) return;
  for (size_t m = 0; m < COUNT; ++m) {
    Vec total = load_part(output + m * Dv + d, Dv - d);
    for (size_t i = 0; i < count; ++i) total += scores[m * SPAN + i] * load_part(values + i * Dv + d, Dv - d);
    store_part(output + m * Dv + d, total, Dv - d);
  }
}

// Scores of a block become probabilities relative to the row's new maximum; its sum and output are rescaled to that.
void soften(float* scores, int64_t visible, float& maximum, float& total, float* output, size_t Dv) {
  for (size_t i = visible < 0 ? 0 : visible; i < SPAN; ++i) scores[i] = NOTHING;
  Vec most = splat(NOTHING);
  for (size_t j = 0; j < SPAN; j += LANES) most = max(most, load(scores + j));
  const float block = largest(most), top = block > maximum ? block : maximum;
  if (visible <= 0 && top == NOTHING) return fill(scores, SPAN, 0);  // nothing seen yet
  if (top > maximum) {
    const float shrink = std::exp(maximum - top);
    maximum = top;
    total *= shrink;
    for (size_t d = 0; d < Dv; ++d) output[d] *= shrink;
  }
  Vec added{};
  for (size_t j = 0; j < SPAN; j += LANES) {
    const Vec p = exp(load(scores + j) - top);
    added += p;
    store(scores + j, p);
  }
  total += sum(added);
}

size_t scratch_floats(const Attention& a, const Tile& tile) {
  const size_t M = a.H / a.G * (tile.t1 - tile.t0);
  return a.D * SPAN + M * (a.D + SPAN + a.Dv + 2);
}

void attend(const Attention& a, const Tile& tile, float* scratch) {
  const size_t R = a.H / a.G, tokens = tile.t1 - tile.t0, M = R * tokens, D = a.D, Dv = a.Dv, half = a.rotary / 2;
  float* const key_block = scratch;  // [D,SPAN]
  float* const query = key_block + D * SPAN;
  float* const scores = query + M * D;
  float* const output = scores + M * SPAN;
  float* const maximum = output + M * Dv;
  float* const total = maximum + M;
  fill(output, M * Dv, 0);
  fill(maximum, M, NOTHING);
  fill(total, M, 0);
  const auto token_of = [&](size_t m) { return tile.b * a.T + tile.t0 + m / R; };  // rows m = t·R + r
  const auto head_of = [&](size_t m) { return token_of(m) * a.H + tile.g * R + m % R; };

  for (size_t m = 0; m < M; ++m) {
    const float* from = a.query + head_of(m) * D;
    float* to = query + m * D;
    if (a.cos)
      rotate(to, from, a.cos + token_of(m) * half, a.sin + token_of(m) * half, D, a.rotary);
    else
      copy(to, from, D);
    for (size_t d = 0; d < D; ++d) to[d] *= a.scale;
  }

  const float* keys = a.keys + (tile.b * a.G + tile.g) * a.S * D;
  const float* values = a.values + (tile.b * a.G + tile.g) * a.S * Dv;
  for (size_t s = tile.s0; s < tile.s1; s += SPAN) {
    const size_t count = tile.s1 - s < SPAN ? tile.s1 - s : SPAN;
    // After the last block this thread's next tile is likely the group after this one, as long as this one.
    const float* next = s + count < tile.s1 ? keys + (s + count) * D : keys + (a.S + tile.s0) * D;
    Ahead ahead(values + s * Dv, count * Dv, next, SPAN * D);
    transpose_keys(keys + s * D, count, D, key_block, ahead);
    in_fours(M, [&]<size_t COUNT>(size_t m) {
      float* const rows = scores + m * SPAN;
      score_rows<COUNT>(query + m * D, key_block, D, rows, ahead);
      for (size_t i = 0; i < COUNT; ++i) {
        const int64_t seen = a.positions[token_of(m + i)] + 1 - static_cast<int64_t>(s);
        const int64_t visible = seen < static_cast<int64_t>(count) ? seen : static_cast<int64_t>(count);
        soften(rows + i * SPAN, visible, maximum[m + i], total[m + i], output + (m + i) * Dv, Dv);
      }
      value_rows<COUNT>(rows, values + s * Dv, count, Dv, output + m * Dv, ahead);
    });
  }

  if (tile.partial) {
    copy(tile.maximum, maximum, M);
    copy(tile.sum, total, M);
    copy(tile.partial, output, M * Dv);
    return;
  }
  for (size_t m = 0; m < M; ++m) {
    const float inverse = total[m] == 0 ? 0 : 1 / total[m];  // NaN stays NaN
    float* to = a.output + head_of(m) * Dv;
    for (size_t d = 0; d < Dv; ++d) to[d] = output[m * Dv + d] * inverse;
  }
}

}  // namespace

#define HEADPOOL_TEXT_(x) #x
#define HEADPOOL_TEXT(x) HEADPOOL_TEXT_(x)
extern const Kernels table;
const Kernels table{HEADPOOL_TEXT(HEADPOOL_ISA), linear, gated, activate, normalise, quantise, rotate, attend, scratch_floats};

}  // namespace headpool::HEADPOOL_ISA
