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
constexpr size_t PANELS = 4;  // at most at a time, as in_fours has them

// output[m] += Σ scores[m][i] · values[i], COUNT rows of a panel of W and COLUMNS vectors of channels at a time
template <class Kind, size_t W, size_t COUNT, size_t COLUMNS>
inline void value_tile(const float* scores, const char* values, size_t d, size_t count, size_t Dv, float* output,
                       Ahead& ahead) {
  constexpr size_t C = LANES / W, NEXT = W == 1 ? SPAN : C;  // from a row's score to the next row's
  const size_t row = Kind::bytes(Dv);
  Vec total[COUNT][COLUMNS];
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) total[m][j] = load(output + m * Dv + d + j * LANES);
  for (size_t i = 0; i < count; ++i) {
    ahead.ask(4);
    Vec value[COLUMNS];
    for (size_t j = 0; j < COLUMNS; ++j) value[j] = Kind::load(values + i * row, d + j * LANES);
    for (size_t m = 0; m < COUNT; ++m) {
      const Vec p = splat(scores[m * NEXT + i / C * LANES + i % C]);
      for (size_t j = 0; j < COLUMNS; ++j) total[m][j] += p * value[j];
    }
  }
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) store(output + m * Dv + d + j * LANES, total[m][j]);
}

template <class Kind, size_t W, size_t COUNT>
inline void value_rows(const float* scores, const char* values, size_t count, size_t Dv, float* output, Ahead& ahead) {
  constexpr size_t C = LANES / W, NEXT = W == 1 ? SPAN : C, COLUMNS = LANES == 16 ? 4 : 2;
  size_t d = 0;
  for (; d + COLUMNS * LANES <= Dv; d += COLUMNS * LANES)
    value_tile<Kind, W, COUNT, COLUMNS>(scores, values, d, count, Dv, output, ahead);
  for (; d + LANES <= Dv; d += LANES) value_tile<Kind, W, COUNT, 1>(scores, values, d, count, Dv, output, ahead);
  if (d == Dv) return;
  for (size_t m = 0; m < COUNT; ++m) {
    Vec total = load_part(output + m * Dv + d, Dv - d);
    for (size_t i = 0; i < count; ++i)
      total += scores[m * NEXT + i / C * LANES + i % C] * Kind::load_part(values + i * Kind::bytes(Dv), d, Dv - d);
    store_part(output + m * Dv + d, total, Dv - d);
  }
}

// A panel of W rows and where it stands.
struct Panel {
  float* maximum;  // [W,C], of the row C times
  float* total;    // [W,C], to be added up
  float* output;   // [rows,Dv]
  size_t rows;     // ≤ W, the rest is nobody's
};

// The scores of a panel become probabilities relative to each row's new maximum (· scales); its sum and output are rescaled to
// that. seen[W,C]: how many keys of the block each sees, at least `least` of them.
template <size_t W, bool SCALED>
void soften(float* scores, const float* scales, const int32_t* seen, size_t least, const Panel& panel, size_t Dv) {
  constexpr size_t C = LANES / W, END = SPAN * W;
  const Int visible = load_as<Int>(seen);
  Vec most = splat(NOTHING);
  if (least < SPAN) {
    Int key;
    for (size_t l = 0; l < LANES; ++l) key[l] = l % C;
    for (size_t j = 0; j < END; j += LANES, key += static_cast<int32_t>(C))
      store(scores + j, key < visible ? load(scores + j) : splat(NOTHING));
  }
  for (size_t j = 0; j < END; j += LANES) most = max(most, load(scores + j));
  const Vec before = load(panel.maximum), top = max(fold<C>(most, [](Vec a, Vec b) { return max(a, b); }), before);
  const Vec base = (top == NOTHING) & (visible <= 0) ? Vec{} : top;  // nothing seen yet
  const Vec shrink = exp(before - base);
  Vec added{};
  for (size_t j = 0; j < END; j += LANES) {
    const Vec p = exp(load(scores + j) - base);
    added += p;
    store(scores + j, SCALED ? p * repeat<C>(scales + j / W) : p);
  }
  store(panel.maximum, top);
  store(panel.total, load(panel.total) * shrink + added);
  float factors[LANES];
  store(factors, shrink);
  for (size_t m = 0; m < panel.rows; ++m)
    if (factors[m * C] != 1)
      for (size_t d = 0; d < Dv; ++d) panel.output[m * Dv + d] *= factors[m * C];
}

// of(w)[count] is the bias of row w.
template <size_t W, class F>
inline void add_bias(float* scores, size_t count, const F& of) {
  constexpr size_t C = LANES / W;
  for (size_t i = 0; i < count; i += LANES) {
    Vec rows[W];
    for (size_t w = 0; w < W; ++w) rows[w] = load_part(of(w) + i, count - i < LANES ? count - i : LANES);
    transpose<C>(rows);
    for (size_t w = 0; w < W; ++w) {
      float* const to = scores + i * W + w * LANES;
      store(to, load(to) + rows[w]);
    }
  }
}

template <class Kind>
void attend_to(const Attention& a, const Tile& tile, float* scratch) {
  const size_t R = a.H / a.G, tokens = tile.t1 - tile.t0, M = R * tokens, D = a.D, Dv = a.Dv, half = a.rotary / 2;
  float* const query = scratch + Scores<Kind>::floats(M, D);
  float* const scores = query + M * D;
  float* const output = scores + PANELS * SPAN * LANES;
  float* const maximum = output + M * Dv;  // of the panel from row m on it is at m · LANES, as is its sum
  float* const total = maximum + M * LANES;
  fill(output, M * Dv, 0);
  fill(maximum, M * LANES, NOTHING);
  fill(total, M * LANES, 0);
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
  constexpr size_t WIDEST = Scores<Kind>::WIDEST;
  const size_t key_row = Kind::bytes(D), value_row = Kind::bytes(Dv);
  const char* keys = a.keys + (tile.b * a.G + tile.g) * a.S * key_row;
  const char* values = a.values + (tile.b * a.G + tile.g) * a.S * value_row;
  const bool one_bias = (R == 1 || !a.bias_steps[1]) && (tokens == 1 || !a.bias_steps[2]);
  const int64_t last = a.positions[token_of(M - 1)];
  const auto ask_bias = [&](size_t s) {
    if (!a.bias || s >= tile.s1) return;
    for (size_t m = 0; m < (one_bias ? 1 : M); ++m) {
      const char* const row = reinterpret_cast<const char*>(bias_of(m) + s);
      for (size_t i = 0; i < SPAN * sizeof(float); i += Ahead::LINE) __builtin_prefetch(row + i);
    }
  };
  float value_scales[SPAN], bias[SPAN] = {};
  Ahead ahead;
  ask_bias(tile.s0);
  for (size_t s = tile.s0; s < tile.s1; s += SPAN) {
    const size_t count = tile.s1 - s < SPAN ? tile.s1 - s : SPAN;
    // After its last row, a thread is likely to go on with the group after this one.
    const size_t next = static_cast<int64_t>(s + count) <= last ? s + count : a.S;
    ahead.begin(keys + next * key_row, SPAN * key_row, values + next * value_row, SPAN * value_row);
    ask_bias(s + SPAN);
    read_scales<Kind>(values + s * value_row, count, Dv, value_scales);
    scores_of.read(keys + s * key_row, count, ahead);
    if (a.bias && one_bias) copy(bias, bias_of(0) + s, count);
    in_panels<WIDEST>(M, [&]<size_t W, size_t COUNT>(size_t m) {
      constexpr size_t C = LANES / W;
      scores_of.template score<W, COUNT>(m, scores, ahead);
      for (size_t p = 0; p < COUNT; ++p) {
        const size_t row = m + p * W, rows = M - row < W ? M - row : W;
        float* const its = scores + p * SPAN * W;
        if (a.bias && one_bias)
          for (size_t j = 0; j < SPAN; j += C) store(its + j * W, load(its + j * W) + repeat<C>(bias + j));
        else if (a.bias)
          add_bias<W>(its, count, [&](size_t w) { return bias_of(row + (w < rows ? w : 0)) + s; });
        int32_t seen[LANES];
        size_t least = SPAN;
        for (size_t w = 0; w < W; ++w) {
          const int64_t sees = a.positions[token_of(row + (w < rows ? w : 0))] + 1 - static_cast<int64_t>(s);
          const size_t visible = sees < 0 ? 0 : static_cast<size_t>(sees) < count ? sees : count;
          for (size_t c = 0; c < C; ++c) seen[w * C + c] = static_cast<int32_t>(visible);
          least = visible < least ? visible : least;
        }
        const Panel panel{maximum + row * LANES, total + row * LANES, output + row * Dv, rows};
        soften<W, Kind::SCALED>(its, value_scales, seen, least, panel, Dv);
      }
      in_fours(M - m < COUNT * W ? M - m : COUNT * W, [&]<size_t ROWS>(size_t row) {
        value_rows<Kind, W, ROWS>(scores + row / W * SPAN * W + row % W * C, values + s * value_row, count, Dv,
                                  output + (m + row) * Dv, ahead);
      });
    });
  }

  in_panels<WIDEST>(M, [&]<size_t W, size_t COUNT>(size_t first) {
    constexpr size_t C = LANES / W;
    for (size_t m = first; m < M && m < first + COUNT * W; ++m) {
      const size_t place = (first + (m - first) / W * W) * LANES + (m - first) % W * C;
      float sum = 0;
      for (size_t c = 0; c < C; ++c) sum += total[place + c];
      if (tile.partial) {
        tile.maximum[m] = maximum[place], tile.sum[m] = sum;
        copy(tile.partial + m * Dv, output + m * Dv, Dv);
        continue;
      }
      const float inverse = sum == 0 ? 0 : 1 / sum;  // NaN stays NaN
      float* to = a.output + head_of(m) * Dv;
      for (size_t d = 0; d < Dv; ++d) to[d] = output[m * Dv + d] * inverse;
    }
  });
}

}  // namespace

size_t scratch_floats(const Attention& a, const Tile& tile) {
  const size_t M = a.H / a.G * (tile.t1 - tile.t0);
  size_t count = M * (a.D + a.Dv + 2 * LANES) + PANELS * SPAN * LANES;
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
