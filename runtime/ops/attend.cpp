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
constexpr float HIDDEN = -0x1p126f;  // finite, a quarter of the lowest: queries that see nothing give finite values
constexpr size_t PANELS = 4;         // at most at a time, as in_fours has them

// output[m] += Σ scores[m][i] · values[i], COUNT rows of panels of W and COLUMNS vectors of channels at a time
template <class Kind, size_t W, size_t COUNT, size_t COLUMNS>
inline void value_tile(const float* scores, const char* values, size_t d, size_t count, size_t Dv, float* output,
                       Ahead& shared) {
  Ahead ahead = shared;  // in registers
  const size_t row = Kind::bytes(Dv);
  Vec total[COUNT][COLUMNS];
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) total[m][j] = load(output + m * Dv + d + j * LANES);
  const auto add = [&](size_t i, const float* score) {
    Vec value[COLUMNS];
    for (size_t j = 0; j < COLUMNS; ++j) value[j] = Kind::load(values + i * row, d + j * LANES);
    for (size_t m = 0; m < COUNT; ++m) {
      const Vec p = splat(score[place<W>(m, 0)]);
      for (size_t j = 0; j < COLUMNS; ++j) total[m][j] += p * value[j];
    }
  };
  constexpr size_t C = LANES / W, STEPS = C < 4 ? C : 4;  // rows whose scores stand side by side
  size_t i = 0;
  for (; i + STEPS <= count; i += STEPS) {
    ahead.ask(4 * STEPS);
    const float* const score = scores + place<W>(0, i);
    HEADPOOL_UNROLL
    for (size_t step = 0; step < STEPS; ++step) add(i + step, score + step);
  }
  for (; i < count; ++i) add(i, scores + place<W>(0, i));
  for (size_t m = 0; m < COUNT; ++m)
    for (size_t j = 0; j < COLUMNS; ++j) store(output + m * Dv + d + j * LANES, total[m][j]);
  shared = ahead;
}

template <class Kind, size_t W, size_t COUNT>
inline void value_rows(const float* scores, const char* values, size_t count, size_t Dv, float* output, Ahead& ahead) {
  constexpr size_t COLUMNS = LANES == 16 ? 4 : 2;
  size_t d = 0;
  for (; d + COLUMNS * LANES <= Dv; d += COLUMNS * LANES)
    value_tile<Kind, W, COUNT, COLUMNS>(scores, values, d, count, Dv, output, ahead);
  for (; d + LANES <= Dv; d += LANES) value_tile<Kind, W, COUNT, 1>(scores, values, d, count, Dv, output, ahead);
  if (d == Dv) return;
  for (size_t m = 0; m < COUNT; ++m) {
    Vec total = load_part(output + m * Dv + d, Dv - d);
    for (size_t i = 0; i < count; ++i)
      total += scores[place<W>(m, i)] * Kind::load_part(values + i * Kind::bytes(Dv), d, Dv - d);
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
// that. seen[W,C]: how many keys of the block each sees.
template <size_t W, bool SCALED>
void soften(float* scores, const float* scales, const int32_t (&seen)[LANES], const Panel& panel, size_t Dv, Ahead& ahead) {
  constexpr size_t C = LANES / W, END = SPAN * W;
  const Int visible = load_as<Int>(seen);
  Vec most = splat(NOTHING);
  bool all = true;
  for (const int32_t count : seen) all &= count >= static_cast<int32_t>(SPAN);
  if (!all) {
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
    ahead.ask(2);
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
    for (size_t w = 0; w < W; ++w) rows[w] = load_some(of(w) + i, count - i);
    transpose<C>(rows);
    for (size_t w = 0; w < W; ++w) {
      float* const to = scores + i * W + w * LANES;
      store(to, load(to) + rows[w]);
    }
  }
}

// A tile's work. Its M query rows are m = t·R + r.
template <class Kind>
class TileWork {
 public:
  static size_t floats(const Attention& a, const Tile& tile) {
    const size_t M = a.H / a.G * (tile.t1 - tile.t0);
    return Scores<Kind>::floats(M, a.D) + PANELS * SPAN * LANES + M * (a.D + a.Dv + 2 * LANES);
  }

  TileWork(const Attention& a, const Tile& tile, float* scratch)
      : a_(a),
        tile_(tile),
        R_(a.H / a.G),
        M_(R_ * (tile.t1 - tile.t0)),
        one_bias_((R_ == 1 || !a.bias_steps[1]) && (tile.t1 - tile.t0 == 1 || !a.bias_steps[2])),
        scores_(scratch + Scores<Kind>::floats(M_, a.D)),
        output_(scores_ + PANELS * SPAN * LANES),
        maximum_(output_ + M_ * a.Dv),
        total_(maximum_ + M_ * LANES),
        scores_of_(queries(total_ + M_ * LANES), M_, a.D, scratch) {
    fill(output_, M_ * a.Dv, 0);
    fill(maximum_, M_ * LANES, NOTHING);
    fill(total_, M_ * LANES, 0);
  }

  void run() {
    const size_t key_row = Kind::bytes(a_.D), value_row = Kind::bytes(a_.Dv), group = (tile_.b * a_.G + tile_.g) * a_.S;
    const char *keys = a_.keys + group * key_row, *values = a_.values + group * value_row;
    const int64_t last = a_.positions[token_of(M_ - 1)];
    ask_bias(tile_.s0);
    for (size_t s = tile_.s0; s < tile_.s1; s += SPAN) {
      const size_t count = tile_.s1 - s < SPAN ? tile_.s1 - s : SPAN;
      // After its last row, a thread is likely to go on with the group after this one.
      const size_t next = static_cast<int64_t>(s + count) <= last ? s + count : a_.S;
      ahead_.begin(count, keys + next * key_row, SPAN * key_row, values + next * value_row, SPAN * value_row);
      ask_bias(s + SPAN);
      block(s, count, keys + s * key_row, values + s * value_row);
    }
    finish();
  }

 private:
  static constexpr size_t WIDEST = Scores<Kind>::WIDEST;

  size_t token_of(size_t m) const { return tile_.b * a_.T + tile_.t0 + m / R_; }
  size_t head_of(size_t m) const { return token_of(m) * a_.H + tile_.g * R_ + m % R_; }
  const float* bias_of(size_t m) const {
    return a_.bias + tile_.b * a_.bias_steps[0] + (tile_.g * R_ + m % R_) * a_.bias_steps[1] +
           (tile_.t0 + m / R_) * a_.bias_steps[2];
  }

  // The queries, rotated and scaled: [M,D].
  const float* queries(float* const all) const {
    const size_t D = a_.D, half = a_.rotary / 2;
    for (size_t m = 0; m < M_; ++m) {
      const float* from = a_.query + head_of(m) * D;
      float* to = all + m * D;
      if (a_.cos)
        rotate(to, from, a_.cos + token_of(m) * half, a_.sin + token_of(m) * half, D, a_.rotary);
      else
        copy(to, from, D);
      for (size_t d = 0; d < D; ++d) to[d] *= a_.scale;
    }
    return all;
  }

  // Asks memory for the bias of the block from s on.
  void ask_bias(size_t s) const {
    if (!a_.bias || s >= tile_.s1) return;
    for (size_t m = 0; m < (one_bias_ ? 1 : M_); ++m) {
      const char* const row = reinterpret_cast<const char*>(bias_of(m) + s);
      for (size_t i = 0; i < SPAN * sizeof(float); i += Ahead::LINE) __builtin_prefetch(row + i);
    }
  }

  // Cache rows s … s + count − 1.
  void block(size_t s, size_t count, const char* keys, const char* values) {
    float value_scales[SPAN], bias[SPAN] = {};  // bias: of all query rows
    read_scales<Kind>(values, count, a_.Dv, value_scales);
    if (a_.bias && one_bias_) copy(bias, bias_of(0) + s, count);
    if (a_.kept)
      for (size_t i = 0; i < count; ++i) bias[i] += a_.kept[tile_.b * a_.S + s + i] ? 0 : HIDDEN;
    scores_of_.read(keys, count, ahead_);
    in_panels<WIDEST>(M_, [&]<size_t W, size_t COUNT>(size_t m) {
      scores_of_.template score<W, COUNT>(m, scores_, ahead_);
      for (size_t p = 0; p < COUNT; ++p) probabilities<W>(m + p * W, scores_ + p * SPAN * W, s, count, bias, value_scales);
      in_fours(M_ - m < COUNT * W ? M_ - m : COUNT * W, [&]<size_t ROWS>(size_t row) {
        value_rows<Kind, W, ROWS>(scores_ + place<W>(row, 0), values, count, a_.Dv, output_ + (m + row) * a_.Dv, ahead_);
      });
    });
  }

  // Of the panel from row m on.
  template <size_t W>
  void probabilities(size_t m, float* scores, size_t s, size_t count, const float* bias, const float* value_scales) {
    constexpr size_t C = LANES / W;
    const size_t rows = M_ - m < W ? M_ - m : W;
    const auto row = [&](size_t w) { return m + (w < rows ? w : 0); };
    if (a_.kept || (a_.bias && one_bias_))
      for (size_t j = 0; j < SPAN; j += C) store(scores + j * W, load(scores + j * W) + repeat<C>(bias + j));
    if (a_.bias && !one_bias_) add_bias<W>(scores, count, [&](size_t w) { return bias_of(row(w)) + s; });
    int32_t seen[LANES];
    for (size_t w = 0; w < W; ++w) {
      const int64_t sees = a_.positions[token_of(row(w))] + 1 - static_cast<int64_t>(s);
      const size_t visible = sees < 0 ? 0 : static_cast<size_t>(sees) < count ? sees : count;
      for (size_t c = 0; c < C; ++c) seen[w * C + c] = static_cast<int32_t>(visible);
    }
    const Panel panel{maximum_ + m * LANES, total_ + m * LANES, output_ + m * a_.Dv, rows};
    soften<W, Kind::SCALED>(scores, value_scales, seen, panel, a_.Dv, ahead_);
  }

  void finish() const {
    in_panels<WIDEST>(M_, [&]<size_t W, size_t COUNT>(size_t first) {
      constexpr size_t C = LANES / W;
      for (size_t m = first; m < M_ && m < first + COUNT * W; ++m) {
        const size_t at = (first + (m - first) / W * W) * LANES + (m - first) % W * C;
        float sum = 0;
        for (size_t c = 0; c < C; ++c) sum += total_[at + c];
        finish(m, maximum_[at], sum);
      }
    });
  }

  void finish(size_t m, float maximum, float sum) const {
    const size_t Dv = a_.Dv;
    if (tile_.partial) {
      tile_.maximum[m] = maximum, tile_.sum[m] = sum;
      return copy(tile_.partial + m * Dv, output_ + m * Dv, Dv);
    }
    const float inverse = sum == 0 ? 0 : 1 / sum;  // NaN stays NaN
    float* to = a_.output + head_of(m) * Dv;
    for (size_t d = 0; d < Dv; ++d) to[d] = output_[m * Dv + d] * inverse;
  }

  const Attention& a_;
  const Tile& tile_;
  const size_t R_, M_;
  const bool one_bias_;                          // for all rows
  float *scores_, *output_, *maximum_, *total_;  // of at most PANELS panels; [M,Dv]; of the panel from row m on at m · LANES
  Scores<Kind> scores_of_;
  Ahead ahead_;
};

}  // namespace

size_t scratch_floats(const Attention& a, const Tile& tile) {
  size_t count = 0;
  by_type(a.cache, [&]<class Kind> { count = TileWork<Kind>::floats(a, tile); });
  return count;
}

void attend(const Attention& a, const Tile& tile, float* scratch) {
  by_type(a.cache, [&]<class Kind> { TileWork<Kind>(a, tile, scratch).run(); });
}

void keep(CacheType type, const float* from, size_t size, char* row) {
  by_type(type, [&]<class Kind> { Kind::keep(from, size, row); });
}

}  // namespace headpool::HEADPOOL_ISA
