// Scores of queries over a block of keys.
//
// They are made in panels of W queries, of which C = LANES / W channels are in the lanes at once, and at the end C keys: the
// scores of a panel are [SPAN/C,W,C]. So keys are read as they lie, and softmax has a query in each lane.
//
// place<W>(m, i) is where the score of row m and key i stands.
//
// Scores<Kind> of queries [M,D] has
//   WIDEST                         the largest W
//   floats(M, D)                   the memory it needs
//   read(keys, count, ahead)       the next block: `count` ≤ SPAN rows
//   score<W, COUNT>(m, to, ahead)  to[COUNT,SPAN/C,W,C] = those of the panels from query m on, which in_panels<WIDEST>(M)
//                                  gave; what is past `count` or M means nothing
#pragma once

#include "cached.hpp"
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace headpool::HEADPOOL_ISA {

constexpr size_t SPAN = 64;  // cache rows worked on at a time: their keys stay in the first-level cache

template <size_t W>
constexpr size_t place(size_t m, size_t i) {
  constexpr size_t C = LANES / W;
  return m / W * SPAN * W + i / C * LANES + m % W * C + i % C;
}

// The cache lines of the block after this one, asked for between the arithmetic and as evenly as that goes, so that memory
// works as long as the processor does and neither waits for the other. Asking past the end of the cache does no harm.
class Ahead {
 public:
  static constexpr size_t LINE = 64;  // bytes, as all counts of bytes here

  // A block of `rows` begins, after which these keys and values will be read. Each row has as many slots as in the block
  // before.
  void begin(size_t rows, const char* keys, size_t key_bytes, const char* values, size_t value_bytes) {
    const size_t slots = (asked() * ONE + due_) / rate_;
    rate_ = slots ? (key_bytes + value_bytes) * ONE * rows_ / (LINE * slots * rows) + 1 : ONE;
    due_ = 0, rows_ = rows;
    at_ = keys_ = keys, end_ = keys_end_ = keys + key_bytes, values_ = values, values_end_ = values + value_bytes;
  }

  // A part of the block's work that is so many slots long.
  void ask(size_t slots) {
    for (due_ += slots * rate_; due_ >= ONE; due_ -= ONE, at_ += LINE) {
      if (at_ >= end_) {
        if (end_ == values_end_) return;
        at_ = values_, end_ = values_end_;
      }
      __builtin_prefetch(at_, 0, 2);  // into the second level: the first holds what is worked on
    }
  }

 private:
  static constexpr size_t ONE = 4096;  // a line a slot

  // Lines asked for. From these the slots are known; a count of them beside the rest would cost what this class is to save.
  size_t asked() const { return (end_ == values_end_ ? keys_end_ - keys_ + (at_ - values_) : at_ - keys_) / LINE; }

  size_t rate_ = ONE, due_ = 0, rows_ = 0;
  const char *keys_ = nullptr, *keys_end_ = nullptr, *values_ = nullptr, *values_end_ = nullptr;
  const char *at_ = nullptr, *end_ = nullptr;  // of the keys, then of the values
};

// The scales of `count` rows of `size` channels; 0 past them.
template <class Kind>
inline void read_scales(const char* rows, size_t count, size_t size, float (&to)[SPAN]) {
  if constexpr (Kind::SCALED)
    for (size_t i = 0; i < SPAN; ++i) to[i] = i < count ? Kind::scale(rows + i * Kind::bytes(size), size) : 0;
}

template <class Kind>
class Scores {
 public:
  static constexpr size_t WIDEST = LANES;
  static size_t floats(size_t M, size_t D) { return padded(D) * (M + LANES + SPAN); }

  Scores(const float* queries, size_t M, size_t D, float* memory)
      : D_(D), row_(padded(D)), queries_(memory), block_(memory + row_ * (M + LANES)) {
    in_panels<WIDEST>(M, [&]<size_t W, size_t COUNT>(size_t m) {
      for (size_t i = m; i < m + COUNT * W; i += W) arrange<W>(queries + i * D, M - i < W ? M - i : W, queries_ + i * row_);
    });
  }

  void read(const char* keys, size_t count, Ahead& ahead) {
    count_ = count;
    read_scales<Kind>(keys, count, D_, scales_);
    keys_ = reinterpret_cast<const float*>(keys);
    whole_ = Kind::FLOATS && D_ == row_ ? count / TILE * TILE : 0;
    for (size_t i = whole_; i < count; ++i) {
      ahead.ask(1 + row_ / LANES);
      for (size_t d = 0; d < D_; d += LANES) {
        const char* key = keys + i * Kind::bytes(D_);
        store(block_ + (i - whole_) * row_ + d, D_ - d < LANES ? Kind::load_part(key, d, D_ - d) : Kind::load(key, d));
      }
    }
  }

  template <size_t W, size_t COUNT>
  void score(size_t m, float* to, Ahead& ahead) const {
    switch (row_) {
      case 64:
        return score_rows<W, COUNT, 64>(m, to, ahead);
      case 128:
        return score_rows<W, COUNT, 128>(m, to, ahead);
      default:
        score_rows<W, COUNT, 0>(m, to, ahead);
    }
  }

 private:
  static constexpr size_t TILE = 16;  // keys that are worked on at a time, at most
  static constexpr size_t FEW = 2;    // queries that wait for memory, which is fastest read in order
  static size_t padded(size_t D) { return (D + LANES - 1) / LANES * LANES; }

  // ROW: floats of a row, which address a tile's keys without a register for each; 0: any number
  template <size_t W, size_t COUNT, size_t ROW>
  void score_rows(size_t m, float* to, Ahead& ahead) const {
    constexpr size_t C = LANES / W, REGISTERS = LANES == 16 ? 16 : 8;  // for sums, of 32 or 16
    constexpr size_t KEYS = COUNT == 1 ? 8 : REGISTERS / (COUNT == 2 ? 2 : 4), ROWS = KEYS < C ? C : KEYS;
    static_assert(ROWS % KEYS == 0 && TILE % ROWS == 0 && SPAN % TILE == 0);
    const size_t row = ROW ? ROW : row_;
    for (size_t i = 0; i < count_; i += ROWS) {
      const float* const keys = i < whole_ ? keys_ + i * row : block_ + (i - whole_) * row;
      Vec sums[COUNT][ROWS];
      HEADPOOL_UNROLL
      for (size_t j = 0; j < ROWS; j += KEYS)
        score_tile<W, COUNT, KEYS, ROWS, ROW>(queries_ + m * row, keys + j * row, j, sums, ahead);
      HEADPOOL_UNROLL
      for (size_t p = 0; p < COUNT; ++p) {
        HEADPOOL_UNROLL
        for (size_t j = 0; j < ROWS; j += C) {
          Vec score = element_sums<C>(sums[p] + j);
          if constexpr (Kind::SCALED) score *= repeat<C>(scales_ + i + j);
          store(to + p * SPAN * W + (i + j) * W, score);
        }
      }
    }
  }

  // Of up to W queries, zeros in place of the others: [D/C,W,C].
  template <size_t W>
  void arrange(const float* queries, size_t count, float* to) const {
    constexpr size_t C = LANES / W;
    for (size_t d = 0; d < D_; d += LANES) {
      Vec rows[W] = {};
      for (size_t w = 0; w < count; ++w) rows[w] = load_some(queries + w * D_ + d, D_ - d);
      transpose<C>(rows);
      for (size_t w = 0; w < W; ++w) store(to + d * W + w * LANES, rows[w]);
    }
  }

  // Of KEYS keys with COUNT panels: sums[COUNT,ROWS] from the j-th on, to be added up in elements of C lanes. Past the block's
  // keys there is memory, but what it holds means nothing.
  template <size_t W, size_t COUNT, size_t KEYS, size_t ROWS, size_t ROW>
  [[gnu::always_inline]] void score_tile(const float* query, const float* keys, size_t j, Vec (&sums)[COUNT][ROWS],
                                         Ahead& ahead) const {
    constexpr size_t C = LANES / W;
    const size_t row = ROW ? ROW : row_;
    Vec total[COUNT][KEYS] = {};
    if constexpr (W <= FEW) {
      HEADPOOL_UNROLL
      for (size_t k = 0; k < KEYS; ++k) {
        ahead.ask(1 + row / LANES);
        for (size_t d = 0; d < row; d += C) total[0][k] += load(query + d * W) * repeat<C>(keys + k * row + d);
      }
    } else {
      constexpr size_t STEPS = 4;  // between two askings: each waits for the count that the one before left in memory
      static_assert(LANES % (STEPS * C) == 0);
      for (size_t d = 0; d < row; d += STEPS * C) {
        ahead.ask(STEPS * COUNT * KEYS / 8);
        HEADPOOL_UNROLL
        for (size_t at = d; at < d + STEPS * C; at += C) {
          Vec its[COUNT];
          HEADPOOL_UNROLL
          for (size_t p = 0; p < COUNT; ++p) its[p] = load(query + p * LANES * row + at * W);
          HEADPOOL_UNROLL
          for (size_t k = 0; k < KEYS; ++k) {
            const Vec key = repeat<C>(keys + k * row + at);
            HEADPOOL_UNROLL
            for (size_t p = 0; p < COUNT; ++p) total[p][k] += its[p] * key;
          }
        }
      }
    }
    HEADPOOL_UNROLL
    for (size_t p = 0; p < COUNT; ++p) {
      HEADPOOL_UNROLL
      for (size_t k = 0; k < KEYS; ++k) sums[p][j + k] = total[p][k];
    }
  }

  size_t D_, row_, count_ = 0, whole_ = 0;  // row_: D, padded; whole_: keys of the block that are read where they lie
  float *queries_, *block_;                 // [M,row_], as arranged; [SPAN,row_] of the other keys
  const float* keys_ = nullptr;
  float scales_[SPAN];
};

#if defined(__AVX512VNNI__)
// Over int8 keys as products of bytes, which are exact. A query is a whole number of 24 bits for each channel, times a step:
// three bytes, each multiplied with the keys, that differ from it by less than a float's own rounding of its largest one. They
// are made positive by adding 2²³, which 2²³ · Σ key takes out again.
template <>
class Scores<Int8> {
 public:
  static constexpr size_t WIDEST = 1;
  static size_t floats(size_t M, size_t D) { return fours(D) * (SPAN + BYTES * M) + M; }

  Scores(const float* queries, size_t M, size_t D, float* memory)
      : D_(D), fours_(fours(D)), steps_(memory), queries_(reinterpret_cast<char*>(memory + M)) {
    block_ = queries_ + 4 * BYTES * fours_ * M;
    std::memset(queries_, 0, 4 * BYTES * fours_ * M);
    for (size_t m = 0; m < M; ++m) split(queries + m * D, m);
  }

  void read(const char* keys, size_t count, Ahead& ahead) {
    read_scales<Int8>(keys, count, D_, scales_);
    for (size_t i = 0; i < SPAN; i += LANES) {
      for (size_t d = 0; d < D_; d += 4 * LANES) {  // a row's bytes, in fours, are turned as floats would be
        ahead.ask(LANES + 1);
        const size_t part = D_ - d < 4 * LANES ? D_ - d : 4 * LANES;
        const __mmask64 mask = ~0ull >> (64 - part);
        Vec a[LANES];
        HEADPOOL_UNROLL
        for (size_t j = 0; j < LANES; ++j)
          a[j] = (Vec)_mm512_maskz_loadu_epi8(i + j < count ? mask : 0, keys + (i + j) * Int8::bytes(D_) + d);
        transpose(a);
        HEADPOOL_UNROLL
        for (size_t j = 0; j < LANES; ++j)
          if (j < (part + 3) / 4) std::memcpy(block_ + ((d / 4 + j) * SPAN + i) * 4, &a[j], sizeof a[j]);
      }
      Int sum{};
      for (size_t f = 0; f < fours_; ++f) sum = add_products(sum, Int{} + 0x01010101, key(f, i));
      std::memcpy(sums_ + i, &sum, sizeof sum);
    }
  }

  template <size_t, size_t COUNT>
  void score(size_t m, float* to, Ahead& ahead) const {
    constexpr size_t COLUMNS = 2;  // 4 × 3 × 2 + 2 of 32 registers
    for (size_t i = 0; i < SPAN; i += COLUMNS * LANES) {
      Int total[COUNT][BYTES][COLUMNS] = {};
      for (size_t f = 0; f < fours_; ++f) {
        ahead.ask(2);
        for (size_t c = 0; c < COUNT; ++c)
          for (size_t b = 0; b < BYTES; ++b) {
            const Int query = Int{} + load_as<int32_t>(queries_ + (((m + c) * fours_ + f) * BYTES + b) * 4);
            for (size_t j = 0; j < COLUMNS; ++j) total[c][b][j] = add_products(total[c][b][j], query, key(f, i + j * LANES));
          }
      }
      for (size_t c = 0; c < COUNT; ++c)
        for (size_t j = 0; j < COLUMNS; ++j) {
          const size_t at = i + j * LANES;
          const Int high = total[c][2][j] - 128 * load_as<Int>(sums_ + at);
          const Vec sum = floats_of(high) * 65536.0f + (floats_of(total[c][1][j]) * 256.0f + floats_of(total[c][0][j]));
          store(to + c * SPAN + at, sum * (steps_[m + c] * load(scales_ + at)));
        }
    }
  }

 private:
  static constexpr size_t BYTES = 3;
  static size_t fours(size_t D) { return (D + 3) / 4; }
  static Vec floats_of(Int v) { return __builtin_convertvector(v, Vec); }
  static Int add_products(Int total, Int positive, Int key) {
    return (Int)_mm512_dpbusd_epi32((__m512i)total, (__m512i)positive, (__m512i)key);
  }
  Int key(size_t f, size_t i) const { return load_as<Int>(block_ + (f * SPAN + i) * 4); }

  void split(const float* query, size_t m) {
    float most = 0, nothing = 0;
    for (size_t d = 0; d < D_; ++d) {
      const float size = query[d] < 0 ? -query[d] : query[d];
      most = size > most ? size : most;
      nothing += size * 0.0f;  // 0, or NaN
    }
    const float step = nothing == 0 ? most / 8388600 : nothing;  // a little less than 2²³, so that no quotient reaches that
    steps_[m] = step < 0x1p-126f ? 0 : step;
    for (size_t d = 0; d < D_; ++d) {
      const auto whole =
          static_cast<uint32_t>((1 << 23) + (steps_[m] > 0 ? static_cast<int>(std::nearbyint(query[d] / step)) : 0));
      for (size_t b = 0; b < BYTES; ++b)
        queries_[((m * fours_ + d / 4) * BYTES + b) * 4 + d % 4] = static_cast<char>(whole >> 8 * b & 255);
    }
  }

  size_t D_, fours_;
  float* steps_;   // [M]
  char* queries_;  // [M,fours,BYTES,4]: bytes of four channels together
  char* block_;    // [fours,SPAN,4]
  float scales_[SPAN];
  int32_t sums_[SPAN];  // of each key's channels
};
#endif

}  // namespace headpool::HEADPOOL_ISA
