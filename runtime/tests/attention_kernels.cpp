// The kernels of attention against plain loops in double precision.
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

struct AttentionCase {
  Attention a{};
  Floats query, keys, values, cos, sin, output;
  std::vector<int64_t> positions;
};

// Every sequence at a place of its own; the cache rows that none of its tokens may see are NaN, to show who reads them.
AttentionCase attention_case() {
  AttentionCase c;
  Attention& a = c.a;
  a.B = pick(1, 3), a.G = pick(1, 3), a.H = a.G * pick(1, 16);
  a.D = one_of({8, 20, 48, 64, 80, 128}), a.Dv = one_of({a.D, a.D / 2, a.D + 4, 7});
  a.T = one_of({1, 1, 2, 7, 19}), a.S = a.T + one_of({0, 1, 44, 63, 64, 130, 300});
  a.rotary = one_of({0, a.D, a.D / 2});
  a.scale = 1 / std::sqrt(float(a.D));
  c.query = normal(a.B * a.T * a.H * a.D, 2);
  c.keys = normal(a.B * a.G * a.S * a.D, 2), c.values = normal(a.B * a.G * a.S * a.Dv);
  c.output = Floats(a.B * a.T * a.H * a.Dv, 77);
  if (a.rotary) c.cos = normal(a.B * a.T * a.rotary / 2), c.sin = normal(a.B * a.T * a.rotary / 2);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (size_t b = 0; b < a.B; ++b) {
    const size_t first = pick(0, a.S - a.T);
    for (size_t t = 0; t < a.T; ++t) c.positions.push_back(first + t);
    for (size_t g = b * a.G; g < (b + 1) * a.G; ++g) {
      const size_t unseen = g * a.S + first + a.T, end = (g + 1) * a.S;
      std::fill(c.keys.begin() + unseen * a.D, c.keys.begin() + end * a.D, nan);
      std::fill(c.values.begin() + unseen * a.Dv, c.values.begin() + end * a.Dv, nan);
    }
  }
  a.query = c.query.data(), a.keys = c.keys.data(), a.values = c.values.data(), a.positions = c.positions.data();
  a.cos = data(c.cos), a.sin = data(c.sin), a.output = c.output.data();
  return c;
}

// The output [Dv] of head h of token t of sequence b.
std::vector<double> attention(const Attention& a, size_t b, size_t t, size_t h) {
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
    for (size_t d = 0; d < a.D; ++d) score += query[d] * a.keys[(g * a.S + s) * a.D + d];
    weights.push_back(score * a.scale);
    largest = std::max(largest, weights.back());
  }
  for (double& weight : weights) total += weight = std::exp(weight - largest);
  for (size_t s = 0; s < weights.size(); ++s)
    for (size_t d = 0; d < a.Dv; ++d) output[d] += weights[s] / total * a.values[(g * a.S + s) * a.Dv + d];
  return output;
}

void check_output(const AttentionCase& c, const char* kind) {
  const Attention& a = c.a;
  const std::string what =
      named(std::string(kind) + " attention B, T, S, H, G, D, Dv, rotary", {a.B, a.T, a.S, a.H, a.G, a.D, a.Dv, a.rotary});
  for (size_t b = 0; b < a.B; ++b)
    for (size_t t = 0; t < a.T; ++t)
      for (size_t h = 0; h < a.H; ++h) {
        const std::vector<double> expected = attention(a, b, t, h);
        for (size_t d = 0; d < a.Dv; ++d) close(c.output[((b * a.T + t) * a.H + h) * a.Dv + d], expected[d], 2e-5, what);
      }
}

void attend(const Kernels& kernels, const Attention& a, const Tile& tile) {
  Floats scratch(kernels.scratch_floats(a, tile), std::numeric_limits<float>::quiet_NaN());
  kernels.attend(a, tile, scratch.data());
}

void test_attend(const Kernels& kernels) {
  for (int i = 0; i < 150; ++i) {
    const AttentionCase c = attention_case();
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
  for (int i = 0; i < 100; ++i) {
    AttentionCase c = attention_case();
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

// Two keys with scores 0 and x ≤ 0, of values 0 and 1: the output is e^x / (1 + e^x).
void test_exp_of_negative_numbers(const Kernels& kernels) {
  const float query = 1, values[] = {0, 1};
  const int64_t position = 1;
  double worst = 0;
  for (double x = -86.9; x <= 0; x += 0.001) {
    const float keys[] = {0, float(x)};
    float output = 77;
    const Attention a{&query, keys, values, &position, nullptr, nullptr, &output, 1, 1, 2, 1, 1, 1, 1, 0, 1};
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
    const Attention a{&query, keys, values, &position, nullptr, nullptr, &output, 1, 1, 4, 1, 1, 1, 1, 0, 1};
    attend(kernels, a, {0, 0, 0, 1, 0, 4, nullptr, nullptr, nullptr});
    const double expected[] = {0, 1, 2, 3, 3};
    close(output, expected[position + 1], 1e-6, "scores of thousands");
  }
}

}  // namespace

void test_attention(const Kernels& kernels) {
  test_rotate(kernels);
  test_attend(kernels);
  test_split(kernels);
  test_exp_of_negative_numbers(kernels);
  test_extremes(kernels);
}

}  // namespace headpool::tests
