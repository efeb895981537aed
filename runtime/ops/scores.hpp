// Scores of queries over a block of keys.
//
// Scores<Kind> of queries [M,D] has
//   floats(M, D)                the memory it needs
//   read(keys, count, ahead)    the next block: `count` ≤ SPAN rows
//   score<COUNT>(m, to, ahead)  to[COUNT,SPAN] = those of queries m … m + COUNT − 1; what is past `count` means nothing
#pragma once

#include "cached.hpp"
#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace headpool::HEADPOOL_ISA {

constexpr size_t SPAN = 64;  // cache rows worked on at a time: their keys, transposed, stay in the first-level cache

// The cache lines of the block after this one, asked for between the arithmetic and as evenly as that goes, so that memory
// works as long as the processor does and neither waits for the other. Asking past the end of the cache does no harm.
class Ahead {
 public:
  // A block begins, after which these keys and values will be read. It has as many slots as the one before.
  void begin(const char* keys, size_t key_bytes, const char* values, size_t value_bytes) {
    rate_ = slots_ ? (key_bytes + value_bytes) * ONE / (LINE * slots_) + 1 : ONE;
    slots_ = due_ = 0;
    at_ = keys, end_ = keys + key_bytes, values_ = values, values_end_ = values + value_bytes;
  }

  // A part of the block's work that is so many slots long.
  void ask(size_t slots) {
    slots_ += slots;
    for (due_ += slots * rate_; due_ >= ONE; due_ -= ONE, at_ += LINE) {
      if (at_ >= end_) {
        if (end_ == values_end_) return;
        at_ = values_, end_ = values_end_;
      }
      __builtin_prefetch(at_, 0, 2);  // into the second level: the first holds what is worked on
    }
  }

 private:
  static constexpr size_t LINE = 64;   // bytes, as all counts of bytes here
  static constexpr size_t ONE = 4096;  // a line a slot

  size_t rate_ = ONE, slots_ = 0, due_ = 0;
  const char *at_ = nullptr, *end_ = nullptr, *values_ = nullptr, *values_end_ = nullptr;
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
  static size_t floats(size_t, size_t D) { return D * SPAN; }

  Scores(const float* queries, size_t M, size_t D, float* memory) : queries_(queries), M_(M), D_(D), block_(memory) {}

  void read(const char* keys, size_t count, Ahead& ahead) {
    keys_ = keys, count_ = count;
    read_scales<Kind>(keys, count, D_, scales_);
    if (M_ > FEW) transpose_keys(ahead);
  }

  template <size_t COUNT>
  void score(size_t m, float* to, Ahead& ahead) const {
    if (M_ <= FEW) return score_directly<COUNT>(queries_ + m * D_, to, ahead);
    constexpr size_t COLUMNS = LANES == 16 ? 4 : 2;  // 4 × 4 + 4 of 32 registers, 4 × 2 + 2 of 16
    static_assert(SPAN % (COLUMNS * LANES) == 0);
    for (size_t i = 0; i < SPAN; i += COLUMNS * LANES) score_tile<COUNT, COLUMNS>(queries_ + m * D_, i, to + i, ahead);
  }

 private:
  static constexpr size_t FEW = 2;  // queries for which keys are read as they lie: transposing them would cost more

  // block[d][i] = keys[i][d]; columns past `count` are 0.
  void transpose_keys(Ahead& ahead) {
    if (count_ < SPAN) fill(block_, D_ * SPAN, 0);
    const size_t row = Kind::bytes(D_);
    size_t i = 0;
    for (; i + LANES <= count_; i += LANES)
      for (size_t d = 0; d + LANES <= D_; d += LANES) {
        ahead.ask(LANES / 2);
        Vec a[LANES];
        HEADPOOL_UNROLL
        for (size_t j = 0; j < LANES; ++j) a[j] = Kind::load(keys_ + (i + j) * row, d);
        transpose(a);
        HEADPOOL_UNROLL
        for (size_t j = 0; j < LANES; ++j) store(block_ + (d + j) * SPAN + i, a[j]);
      }
    for (size_t j = 0; j < count_; ++j)  // what is left of each row: all of the last few ones
      for (size_t d = j < i ? D_ / LANES * LANES : 0; d < D_; d += LANES) {
        const size_t part = D_ - d < LANES ? D_ - d : LANES;
        const Vec some = Kind::load_part(keys_ + j * row, d, part);
        for (size_t e = 0; e < part; ++e) block_[(d + e) * SPAN + j] = some[e];
      }
  }

  Vec scaled(Vec score, size_t i) const {
    if constexpr (Kind::SCALED) return score * load(scales_ + i);
    return score;
  }

  // COUNT queries and COLUMNS vectors of keys from the i-th on at a time, held in registers
  template <size_t COUNT, size_t COLUMNS>
  void score_tile(const float* query, size_t i, float* to, Ahead& ahead) const {
    Vec total[COUNT][COLUMNS] = {};
    for (size_t d = 0; d < D_; ++d) {
      ahead.ask(2);
      Vec key[COLUMNS];
      for (size_t j = 0; j < COLUMNS; ++j) key[j] = load(block_ + d * SPAN + i + j * LANES);
      for (size_t m = 0; m < COUNT; ++m) {
        const Vec q = splat(query[m * D_ + d]);
        for (size_t j = 0; j < COLUMNS; ++j) total[m][j] += q * key[j];
      }
    }
    for (size_t m = 0; m < COUNT; ++m)
      for (size_t j = 0; j < COLUMNS; ++j) store(to + m * SPAN + j * LANES, scaled(total[m][j], i + j * LANES));
  }

  template <size_t COUNT>
  void score_directly(const float* query, float* to, Ahead& ahead) const {
    const size_t row = Kind::bytes(D_);
    for (size_t i = 0; i < count_; i += LANES) {
      Vec sums[COUNT][LANES] = {};
      for (size_t j = 0; j < LANES && i + j < count_; ++j) {
        ahead.ask(1 + row / 64);
        const char* key = keys_ + (i + j) * row;
        Vec total[COUNT] = {};
        size_t d = 0;
        for (; d + LANES <= D_; d += LANES) {
          const Vec k = Kind::load(key, d);
          for (size_t m = 0; m < COUNT; ++m) total[m] += k * load(query + m * D_ + d);
        }
        if (d < D_) {
          const Vec k = Kind::load_part(key, d, D_ - d);
          for (size_t m = 0; m < COUNT; ++m) total[m] += k * load_part(query + m * D_ + d, D_ - d);
        }
        for (size_t m = 0; m < COUNT; ++m) sums[m][j] = total[m];
      }
      for (size_t m = 0; m < COUNT; ++m) store(to + m * SPAN + i, scaled(row_sums(sums[m]), i));
    }
  }

  const float* queries_;
  size_t M_, D_, count_ = 0;
  float* block_;  // [D,SPAN]
  const char* keys_ = nullptr;
  float scales_[SPAN];
};

#if defined(__AVX512VNNI__)
// Over int8 keys as products of bytes, which are exact. A query is a whole number of 24 bits for each channel, times a step:
// three bytes, each multiplied with the keys, that differ from it by less than a float's own rounding of its largest one. They
// are made positive by adding 2²³, which 2²³ · Σ key takes out again.
template <>
class Scores<Int8> {
 public:
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

  template <size_t COUNT>
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
