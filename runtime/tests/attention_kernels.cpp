// The kernels of attention against plain loops in double precision.
#include <cstring>

#include "kernel_tests.hpp"

namespace headpool::tests {
namespace {

void test_rotate(const Kernels& kernels) {
  for (size_t D : {2, 8, 20, 64, 80})
    for (size_t rotary = 2; rotary <= D; rotary += 2)
      for (const bool in_place : {false, true}) {
        const Floats from = normal(D), cos = normal(rotary / 2), sin = normal(rotary / 2);
        Floats to = in_place ? from : Floats(D, 77);
        kernels.rotate(to.data(), in_place ? to.data() : from.data(), cos.data(), sin.data(), D, rotary);
        for (size_t d = 0; d < D; ++d) {
          const size_t half = rotary / 2, i = d % half;
          const double x = from[i], y = from[i + half];
          const double expected = d >= rotary ? from[d] : d < half ? x * cos[i] - y * sin[i] : y * cos[i] + x * sin[i];
          close(to[d], expected, 1e-6 * (1 + std::abs(x) + std::abs(y)), "rotate");
        }
      }
}

// ---- Caches

const float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr CacheType TYPES[] = {CacheType::fp32, CacheType::fp16, CacheType::int8};

// What the bits of a half stand for.
double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31  ? fraction ? NOT_A_NUMBER : std::numeric_limits<double>::infinity()
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// The bits of the half nearest to x, of two the even one.
uint16_t half_bits(double x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7E00;
  int exponent = -100;
  if (x != 0) std::frexp(x, &exponent);  // x = m · 2^exponent, m from a half
  const int step = std::max(exponent, -13) - 11;
  const double steps = std::abs(x) < 1e6 ? std::nearbyint(std::ldexp(std::abs(x), -step)) : 0;
  if (std::abs(x) >= 1e6 || std::ldexp(steps, step) > 65504) return sign | 0x7C00;
  // From 1024 steps on the number has an exponent of its own, and 2048 are 1024 of the next one.
  return sign | static_cast<uint16_t>((step + 24) * 1024 + steps);
}

// Rows of a cache as this test rounds them, and the floats that they stand for.
struct Stored {
  CacheType type;
  size_t size;
  std::vector<char> bytes;
  Floats floats;

  Stored() = default;
  Stored(CacheType type, size_t size, const Floats& from)
      : type(type), size(size), bytes(from.size() / size * row_bytes()), floats(from.size()) {
    for (size_t row = 0; row < from.size() / size; ++row) put(row, &from[row * size]);
  }

  size_t row_bytes() const { return type == CacheType::int8 ? size + 4 : type == CacheType::fp16 ? 2 * size : 4 * size; }

  void put(size_t row, const float* from) {
    char* const to = bytes.data() + row * row_bytes();
    float* const back = &floats[row * size];
    float scale = 0;
    for (size_t d = 0; d < size; ++d) scale = std::max(scale, std::abs(from[d]) / 127);
    for (size_t d = 0; d < size; ++d) {
      if (type == CacheType::fp32) {
        back[d] = from[d];
        std::memcpy(to + 4 * d, &back[d], 4);
      } else if (type == CacheType::fp16) {
        const uint16_t bits = half_bits(from[d]);
        back[d] = static_cast<float>(half_value(bits));
        std::memcpy(to + 2 * d, &bits, 2);
      } else {
        const float q = scale > 0 ? std::nearbyint(from[d] / scale) : 0;
        back[d] = q * scale;
        to[d] = static_cast<char>(static_cast<int8_t>(q));
      }
    }
    if (type == CacheType::int8) std::memcpy(to + size, &scale, 4);
  }

  // A row that shows who reads it.
  void spoil(size_t row) {
    const Floats nan(size, NOT_A_NUMBER);
    put(row, nan.data());
    if (type == CacheType::int8) std::memcpy(bytes.data() + (row + 1) * row_bytes() - 4, nan.data(), 4);
  }
};

// The memory that a tile is worked out in has whatever was there.
void attend(const Kernels& kernels, const Attention& a, const Tile& tile) {
  Floats scratch(kernels.scratch_floats(a, tile), std::numeric_limits<float>::quiet_NaN());
  kernels.attend(a, tile, scratch.data());
}

// Rows that `keep` writes are those of this test to the bit, and nothing beside them is written.
void test_keep(const Kernels& kernels) {
  for (const CacheType type : TYPES)
    for (size_t size = 1; size <= 140; ++size) {
      Floats from = normal(size, one_of({1, 30}));
      if (size % 5 == 0) from[pick(0, size - 1)] *= 1000;
      if (size % 7 == 0) std::fill(from.begin(), from.end(), 0.0f);
      const Stored expected(type, size, from);
      std::vector<char> row(expected.row_bytes());
      kernels.keep(type, from.data(), size, row.data());
      expect(row == expected.bytes, named("keep type, size", {size_t(type), size}));
    }
}

// Every half, read; every one and what lies around the middle to its neighbour, written.
void test_halves(const Kernels& kernels) {
  constexpr size_t COUNT = 65536;
  std::vector<uint16_t> all(COUNT);
  for (size_t i = 0; i < COUNT; ++i) all[i] = static_cast<uint16_t>(i);
  // One key is seen, so that the output is its value.
  const float query = 1;
  const uint16_t key = 0;
  const int64_t position = 0;
  Floats output(COUNT);
  Attention a{};
  a.query = &query, a.positions = &position, a.output = output.data(), a.cache = CacheType::fp16;
  a.keys = reinterpret_cast<const char*>(&key), a.values = reinterpret_cast<const char*>(all.data());
  a.B = a.T = a.S = a.H = a.G = a.D = 1, a.Dv = COUNT, a.scale = 1;
  attend(kernels, a, {0, 0, 0, 1, 0, 1, nullptr, nullptr, nullptr});
  Floats around;
  for (size_t i = 0; i < COUNT; ++i) {
    const double value = half_value(all[i]);
    expect(std::isnan(value) ? std::isnan(output[i]) : output[i] == value, named("half", {i}));
    if (std::isfinite(value)) {
      const double next = all[i] % 0x8000 == 0x7BFF ? std::copysign(65536, value) : half_value(all[i] + 1);
      const auto middle = static_cast<float>((value + next) / 2);
      around.insert(around.end(), {float(value), std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 1e9f),
                                   std::nextafter(middle, -1e9f)});
    }
  }
  around.insert(around.end(), {1e6f, -1e6f, 3e38f, 1e-38f, -1e-45f, std::numeric_limits<float>::infinity()});
  std::vector<uint16_t> written(around.size());
  kernels.keep(CacheType::fp16, around.data(), around.size(), reinterpret_cast<char*>(written.data()));
  for (size_t i = 0; i < around.size(); ++i) expect(written[i] == half_bits(around[i]), "half of " + std::to_string(around[i]));
  kernels.keep(CacheType::fp16, &NOT_A_NUMBER, 1, reinterpret_cast<char*>(written.data()));
  expect(std::isnan(half_value(written[0])), "half of NaN");
}

// What is not a number or has no end makes its row so; rows too small for a scale are zeros.
void test_int8_extremes(const Kernels& kernels) {
  const auto scale_of = [](const std::vector<char>& row) {
    float scale;
    std::memcpy(&scale, &row[row.size() - 4], 4);
    return scale;
  };
  for (const float odd : {NOT_A_NUMBER, std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()})
    for (size_t at = 0; at < 40; ++at) {
      Floats from = normal(40);
      from[at] = odd;
      std::vector<char> row(44, 77);
      kernels.keep(CacheType::int8, from.data(), 40, row.data());
      expect(std::isnan(scale_of(row)), named("NaN scale of", {at}));
    }
  for (const float size : {0.0f, 1e-45f, 1e-38f, 1e-30f, 3e38f}) {
    Floats from(40, size);
    from[3] = -size, from[7] = 0;
    std::vector<char> row(44, 77);
    kernels.keep(CacheType::int8, from.data(), 40, row.data());
    for (size_t d = 0; d < 40; ++d)
      close(row[d] * double(scale_of(row)), size < 1e-35f ? 0 : from[d], double(size) * 1e-6,
            "int8 of " + std::to_string(size));
  }
}

// ---- Attention

struct AttentionCase {
  Attention a{};
  Floats query, cos, sin, bias, output;
  Stored keys, values;
  std::vector<int64_t> positions;
};

// Every sequence at a place of its own; the cache rows that none of its tokens may see are NaN, to show who reads them.
AttentionCase attention_case(CacheType type) {
  AttentionCase c;
  Attention& a = c.a;
  a.B = pick(1, 3), a.G = pick(1, 3), a.H = a.G * pick(1, 16);
  a.D = one_of({2, 8, 10, 20, 40, 48, 64, 80, 128, 256}), a.Dv = one_of({a.D, a.D / 2, a.D + 4, 7});
  a.T = one_of({1, 1, 2, 7, 19}), a.S = a.T + one_of({0, 1, 44, 63, 64, 130, 300});
  a.rotary = one_of({0, a.D, a.D / 4 * 2});
  a.scale = 1 / std::sqrt(float(a.D));
  c.query = normal(a.B * a.T * a.H * a.D, 2);
  c.keys = Stored(type, a.D, normal(a.B * a.G * a.S * a.D, 2));
  c.values = Stored(type, a.Dv, normal(a.B * a.G * a.S * a.Dv));
  c.output = Floats(a.B * a.T * a.H * a.Dv, 77);
  if (a.rotary) c.cos = normal(a.B * a.T * a.rotary / 2), c.sin = normal(a.B * a.T * a.rotary / 2);
  for (size_t b = 0; b < a.B; ++b) {
    const size_t first = pick(0, a.S - a.T);
    for (size_t t = 0; t < a.T; ++t) c.positions.push_back(first + t);
    for (size_t g = b * a.G; g < (b + 1) * a.G; ++g)
      for (size_t row = g * a.S + first + a.T; row < (g + 1) * a.S; ++row) c.keys.spoil(row), c.values.spoil(row);
  }
  a.query = c.query.data(), a.positions = c.positions.data();
  a.cache = type, a.keys = c.keys.bytes.data(), a.values = c.values.bytes.data();
  a.cos = data(c.cos), a.sin = data(c.sin), a.output = c.output.data();
  if (pick(0, 1)) {  // of all, or the same for all sequences, heads or tokens
    const size_t sizes[] = {a.B, a.H, a.T};
    size_t step = a.S;
    for (size_t i = 3; i-- > 0;)
      if (pick(0, 2)) a.bias_steps[i] = step, step *= sizes[i];
    c.bias = normal(step, 2);
    a.bias = c.bias.data();
  }
  return c;
}

// The output [Dv] of head h of token t of sequence b.
std::vector<double> attention(const AttentionCase& c, size_t b, size_t t, size_t h) {
  const Attention& a = c.a;
  const size_t token = b * a.T + t, half = a.rotary / 2, g = b * a.G + h / (a.H / a.G);
  const float* from = a.query + (token * a.H + h) * a.D;
  std::vector<double> query(from, from + a.D), weights, output(a.Dv);
  for (size_t i = 0; i < half; ++i) {
    const double cos = a.cos[token * half + i], sin = a.sin[token * half + i];
    query[i] = from[i] * cos - from[i + half] * sin;
    query[i + half] = from[i + half] * cos + from[i] * sin;
  }
  double largest = -std::numeric_limits<double>::infinity(), total = 0;
  for (int64_t s = 0; s <= a.positions[token]; ++s) {
    double score = 0;
    for (size_t d = 0; d < a.D; ++d) score += query[d] * c.keys.floats[(g * a.S + s) * a.D + d];
    weights.push_back(score * a.scale);
    if (a.bias) weights.back() += a.bias[b * a.bias_steps[0] + h * a.bias_steps[1] + t * a.bias_steps[2] + s];
    largest = std::max(largest, weights.back());
  }
  for (double& weight : weights) total += weight = std::exp(weight - largest);
  for (size_t s = 0; s < weights.size(); ++s)
    for (size_t d = 0; d < a.Dv; ++d) output[d] += weights[s] / total * c.values.floats[(g * a.S + s) * a.Dv + d];
  return output;
}

void check_output(const AttentionCase& c, const char* kind) {
  const Attention& a = c.a;
  const std::string what = named(std::string(kind) + " attention type, B, T, S, H, G, D, Dv, rotary",
                                 {size_t(a.cache), a.B, a.T, a.S, a.H, a.G, a.D, a.Dv, a.rotary});
  for (size_t b = 0; b < a.B; ++b)
    for (size_t t = 0; t < a.T; ++t)
      for (size_t h = 0; h < a.H; ++h) {
        const std::vector<double> expected = attention(c, b, t, h);
        for (size_t d = 0; d < a.Dv; ++d) close(c.output[((b * a.T + t) * a.H + h) * a.Dv + d], expected[d], 2e-5, what);
      }
}

void test_attend(const Kernels& kernels) {
  for (int i = 0; i < 360; ++i) {
    const AttentionCase c = attention_case(TYPES[i % 3]);
    const size_t step = pick(1, c.a.T);
    for (size_t b = 0; b < c.a.B; ++b)
      for (size_t g = 0; g < c.a.G; ++g)
        for (size_t t0 = 0; t0 < c.a.T; t0 += step) {
          const size_t t1 = std::min(c.a.T, t0 + step), used = c.positions[b * c.a.T + t1 - 1] + 1;
          attend(kernels, c.a, {b, g, t0, t1, 0, used, nullptr, nullptr, nullptr});
        }
    check_output(c, "whole");
  }
}

// The cache rows of a tile split in parts, some of them empty or of nothing that a token sees, and merged here.
void test_split(const Kernels& kernels) {
  for (int i = 0; i < 240; ++i) {
    AttentionCase c = attention_case(TYPES[i % 3]);
    const Attention& a = c.a;
    const size_t splits = pick(2, 5), R = a.H / a.G, rows = R * a.T;
    for (size_t b = 0; b < a.B; ++b)
      for (size_t g = 0; g < a.G; ++g) {
        const size_t used = c.positions[(b + 1) * a.T - 1] + 1, step = ((used + splits - 1) / splits + 63) / 64 * 64;
        Floats maximum(splits * rows), sum(splits * rows), partial(splits * rows * a.Dv);
        for (size_t split = 0; split < splits; ++split) {
          const size_t s0 = std::min(used, split * step), s1 = std::min(used, s0 + step), row = split * rows;
          attend(kernels, a, {b, g, 0, a.T, s0, s1, &maximum[row], &sum[row], &partial[row * a.Dv]});
        }
        for (size_t m = 0; m < rows; ++m)  // m = t·R + r
          for (size_t d = 0; d < a.Dv; ++d) {
            double top = -std::numeric_limits<double>::infinity(), total = 0, output = 0;
            for (size_t split = 0; split < splits; ++split) top = std::max(top, double(maximum[split * rows + m]));
            for (size_t split = 0; split < splits; ++split) {
              const size_t row = split * rows + m;
              const double weight = std::exp(maximum[row] - top);
              total += weight * sum[row], output += weight * partial[row * a.Dv + d];
            }
            c.output[((b * a.T + m / R) * a.H + g * R + m % R) * a.Dv + d] = output / total;
          }
      }
    check_output(c, "split");
  }
}

// Of one channel, over S rows of floats.
Attention one_head(const float* query, const float* keys, const float* values, const int64_t* position, float* output,
                   size_t S) {
  Attention a{};
  a.query = query, a.positions = position, a.output = output, a.scale = 1;
  a.keys = reinterpret_cast<const char*>(keys), a.values = reinterpret_cast<const char*>(values);
  a.B = a.T = a.H = a.G = a.D = a.Dv = 1, a.S = S;
  return a;
}

// Two keys with scores 0 and x ≤ 0, of values 0 and 1: the output is e^x / (1 + e^x).
void test_exp_of_negative_numbers(const Kernels& kernels) {
  const float query = 1, values[] = {0, 1};
  const int64_t position = 1;
  double worst = 0;
  for (double x = -86.9; x <= 0; x += 0.001) {
    const float keys[] = {0, float(x)};
    float output = 77;
    const Attention a = one_head(&query, keys, values, &position, &output, 2);
    attend(kernels, a, {0, 0, 0, 1, 0, 2, nullptr, nullptr, nullptr});
    const double exact = std::exp(double(keys[1]));
    worst = std::max(worst, std::abs(output / (exact / (1 + exact)) - 1));
  }
  expect(worst < 4e-7, "exp of -87 to 0 is off by " + std::to_string(worst * 1e7) + "e-7");
}

// Scores of thousands must not overflow, and a token that sees nothing gives zeros.
void test_extremes(const Kernels& kernels) {
  const float query = 1, keys[] = {-5e3f, 4e3f, 4e3f, -4e3f}, values[] = {1, 2, 4, 8};
  for (const int64_t position : {0, 1, 2, 3, -1}) {
    float output = 77;
    const Attention a = one_head(&query, keys, values, &position, &output, 4);
    attend(kernels, a, {0, 0, 0, 1, 0, 4, nullptr, nullptr, nullptr});
    const double expected[] = {0, 1, 2, 3, 3};
    close(output, expected[position + 1], 1e-6, "scores of thousands");
  }
}

// So is a query that is not a number, or has no end.
void test_spoilt_queries(const Kernels& kernels) {
  for (const CacheType type : TYPES)
    for (const float odd : {NOT_A_NUMBER, std::numeric_limits<float>::infinity()})
      for (int i = 0; i < 40; ++i) {
        AttentionCase c = attention_case(type);
        const Attention& a = c.a;
        const size_t head = pick(0, a.H - 1), R = a.H / a.G;  // of the first token of the first sequence
        c.query[head * a.D + pick(0, a.D - 1)] = odd;
        attend(kernels, a, {0, head / R, 0, 1, 0, size_t(c.positions[0]) + 1, nullptr, nullptr, nullptr});
        for (size_t h = head / R * R; h < head / R * R + R; ++h)
          for (size_t d = 0; d < a.Dv; ++d)
            expect(std::isnan(c.output[h * a.Dv + d]) == (h == head), named("spoilt query type, M", {size_t(type), R}));
      }
}

// A row that is not a number is seen in what reads it, and only there.
void test_spoilt_rows(const Kernels& kernels) {
  for (const CacheType type : TYPES)
    for (const bool key : {true, false})
      for (size_t at = 0; at < 80; ++at) {
        AttentionCase c = attention_case(type);
        const Attention& a = c.a;
        const size_t g = pick(0, a.B * a.G - 1), b = g / a.G, last = c.positions[(b + 1) * a.T - 1];
        if (last < at) continue;
        (key ? c.keys : c.values).spoil(g * a.S + at);
        const bool seen = pick(0, 1);
        c.positions.assign(c.positions.size(), seen ? last : at - 1);  // of one token a sequence, enough here
        const size_t used = seen ? last + 1 : at;
        attend(kernels, a, {b, g % a.G, 0, 1, 0, used, nullptr, nullptr, nullptr});
        for (size_t r = 0; r < a.H / a.G; ++r)
          for (size_t d = 0; d < a.Dv; ++d) {
            const float output = c.output[(b * a.T * a.H + g % a.G * (a.H / a.G) + r) * a.Dv + d];
            expect(std::isnan(output) == seen, named("spoilt row type, key, at, seen", {size_t(type), key, at, seen}));
          }
      }
}

}  // namespace

void test_attention(const Kernels& kernels) {
  test_keep(kernels);
  test_halves(kernels);
  test_int8_extremes(kernels);
  test_spoilt_queries(kernels);
  test_spoilt_rows(kernels);
  test_rotate(kernels);
  test_attend(kernels);
  test_split(kernels);
  test_exp_of_negative_numbers(kernels);
  test_extremes(kernels);
}

}  // namespace headpool::tests
