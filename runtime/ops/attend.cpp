// The kernels of attention, compiled once for each instruction set as kernels.cpp is, and with its rule about templates.
#include "attend.hpp"

#include <cmath>

#include "scores.hpp"

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

constexpr float NOTHING = -__builtin_inff();

// output[m] += Σ scores[m][i] · values[i], COUNT rows and COLUMNS vectors of channels at a time
template <class Kind, size_t COUNT, size_t COLUMNS>
inline void value_tile(const float* scores, const char* values, size_t d, size_t count, size_t Dv, float* output,
                       Ahead& ahead) {
  const size_t row = Kind::bytes(Dv);
  Vec total[COUNT][COLUMNS];
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) total[m][j] = load(output + m * Dv + d + j * LANES);
  for (size_t i = 0; i < count; ++i) {
    ahead.ask(4);
    Vec value[COLUMNS];
    for (size_t j = 0; j < COLUMNS; ++j) value[j] = Kind::load(values + i * row, d + j * LANES);
    for (size_t m = 0; m < COUNT; ++m) {
      const Vec p = splat(scores[m * SPAN + i]);
      for (size_t j = 0; j < COLUMNS; ++j) total[m][j] += p * value[j];
    }
  }
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) store(output + m * Dv + d + j * LANES, total[m][j]);
}

template <class Kind, size_t COUNT>
inline void value_rows(const float* scores, const char* values, size_t count, size_t Dv, float* output, Ahead& ahead) {
  constexpr size_t COLUMNS = LANES == 16 ? 4 : 2;
  size_t d = 0;
  for (; d + COLUMNS * LANES <= Dv; d += COLUMNS * LANES)
    value_tile<Kind, COUNT, COLUMNS>(scores, values, d, count, Dv, output, ahead);
  for (; d + LANES <= Dv; d += LANES) value_tile<Kind, COUNT, 1>(scores, values, d, count, Dv, output, ahead);
  if (d == Dv) return;
  for (size_t m = 0; m < COUNT; ++m) {
    Vec total = load_part(output + m * Dv + d, Dv - d);
    for (size_t i = 0; i < count; ++i) total += scores[m * SPAN + i] * Kind::load_part(values + i * Kind::bytes(Dv), d, Dv - d);
    store_part(output + m * Dv + d, total, Dv - d);
  }
}

inline void add(float* to, const float* from, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] += from[i];
}

// Scores of a block become probabilities relative to the row's new maximum (· scales); its sum and output are rescaled to that.
template <bool SCALED>
void soften(float* scores, const float* scales, int64_t visible, float& maximum, float& total, float* output, size_t Dv) {
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
    store(scores + j, SCALED ? p * load(scales + j) : p);
  }
  total += sum(added);
}

template <class Kind>
void attend_to(const Attention& a, const Tile& tile, float* scratch) {
  const size_t R = a.H / a.G, tokens = tile.t1 - tile.t0, M = R * tokens, D = a.D, Dv = a.Dv, half = a.rotary / 2;
  float* const query = scratch + Scores<Kind>::floats(M, D);
  float* const scores = query + M * D;
  float* const output = scores + M * SPAN;
  float* const maximum = output + M * Dv;
  float* const total = maximum + M;
  fill(output, M * Dv, 0);
  fill(maximum, M, NOTHING);
  fill(total, M, 0);
  const auto token_of = [&](size_t m) { return tile.b * a.T + tile.t0 + m / R; };  // rows m = t·R + r
  const auto head_of = [&](size_t m) { return token_of(m) * a.H + tile.g * R + m % R; };
  const auto bias_of = [&](size_t m) {
    const size_t place[] = {tile.b, tile.g * R + m % R, tile.t0 + m / R};
    return a.bias + place[0] * a.bias_steps[0] + place[1] * a.bias_steps[1] + place[2] * a.bias_steps[2];
  };

  for (size_t m = 0; m < M; ++m) {
    const float* from = a.query + head_of(m) * D;
    float* to = query + m * D;
    if (a.cos)
      rotate(to, from, a.cos + token_of(m) * half, a.sin + token_of(m) * half, D, a.rotary);
    else
      copy(to, from, D);
    for (size_t d = 0; d < D; ++d) to[d] *= a.scale;
  }

  Scores<Kind> scores_of(query, M, D, scratch);
  const size_t key_row = Kind::bytes(D), value_row = Kind::bytes(Dv);
  const char* keys = a.keys + (tile.b * a.G + tile.g) * a.S * key_row;
  const char* values = a.values + (tile.b * a.G + tile.g) * a.S * value_row;
  float value_scales[SPAN];
  Ahead ahead;
  for (size_t s = tile.s0; s < tile.s1; s += SPAN) {
    const size_t count = tile.s1 - s < SPAN ? tile.s1 - s : SPAN;
    // After the last block this thread's next tile is likely the group after this one, as long as this one.
    const size_t next = s + count < tile.s1 ? s + count : a.S + tile.s0;
    ahead.begin(keys + next * key_row, SPAN * key_row, values + next * value_row, SPAN * value_row);
    read_scales<Kind>(values + s * value_row, count, Dv, value_scales);
    scores_of.read(keys + s * key_row, count, ahead);
    in_fours(M, [&]<size_t COUNT>(size_t m) {
      float* const rows = scores + m * SPAN;
      scores_of.template score<COUNT>(m, rows, ahead);
      for (size_t i = 0; i < COUNT; ++i) {
        if (a.bias) add(rows + i * SPAN, bias_of(m + i) + s, count);
        const int64_t seen = a.positions[token_of(m + i)] + 1 - static_cast<int64_t>(s);
        const int64_t visible = seen < static_cast<int64_t>(count) ? seen : static_cast<int64_t>(count);
        soften<Kind::SCALED>(rows + i * SPAN, value_scales, visible, maximum[m + i], total[m + i], output + (m + i) * Dv, Dv);
      }
      value_rows<Kind, COUNT>(rows, values + s * value_row, count, Dv, output + m * Dv, ahead);
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

size_t scratch_floats(const Attention& a, const Tile& tile) {
  const size_t M = a.H / a.G * (tile.t1 - tile.t0);
  size_t count = M * (a.D + SPAN + a.Dv + 2);
  by_type(a.cache, [&]<class Kind> { count += Scores<Kind>::floats(M, a.D); });
  return count;
}

void attend(const Attention& a, const Tile& tile, float* scratch) {
  by_type(a.cache, [&]<class Kind> { attend_to<Kind>(a, tile, scratch); });
}

void keep(CacheType type, const float* from, size_t size, char* row) {
  by_type(type, [&]<class Kind> { Kind::keep(from, size, row); });
}

}  // namespace headpool::HEADPOOL_ISA
