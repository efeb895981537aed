// The kernels of attention, compiled once for each instruction set as kernels.cpp is, and with its rule about templates.
#include "attend.hpp"

#include <cmath>

#include "simd.hpp"

namespace headpool::HEADPOOL_ISA {
void rotate(float* to, const float* from, const float* cos, const float* sin, size_t D, size_t rotary) {
  const size_t half = rotary / 2;
  for (size_t i = 0; i < half; ++i) {
    const float x = from[i], y = from[i + half];
    to[i] = x * cos[i] - y * sin[i];
    to[i + half] = y * cos[i] + x * sin[i];
  }
  if (to != from) std::memcpy(to + rotary, from + rotary, (D - rotary) * sizeof(float));
}

namespace {

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

}  // namespace

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

}  // namespace headpool::HEADPOOL_ISA
