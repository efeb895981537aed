// Every instruction set's kernels that this processor runs, against plain loops in double precision.
//
// Vectors have the exact size, so that a sanitizer (scripts/sanitizers) sees every access beside them.
#include "../ops/kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace headpool {
namespace plain {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512vnni {
extern const Kernels table;
}
#endif
}  // namespace headpool

namespace {

using namespace headpool;
using Floats = std::vector<float>;

std::mt19937 random_bits(1);
long checks = 0, failures = 0;

size_t pick(size_t from, size_t to) { return std::uniform_int_distribution<size_t>(from, to)(random_bits); }

size_t one_of(const std::vector<size_t>& choices) { return choices[pick(0, choices.size() - 1)]; }

Floats normal(size_t count, float deviation = 1) {
  std::normal_distribution<float> draw(0, deviation);
  Floats values(count);
  for (float& value : values) value = draw(random_bits);
  return values;
}

// A pointer that is null where there is nothing.
const float* data(const Floats& values) { return values.empty() ? nullptr : values.data(); }

void expect(bool holds, const std::string& what) {
  ++checks;
  if (!holds && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

void close(double actual, double expected, double tolerance, const std::string& what) {
  if (std::abs(actual - expected) <= tolerance)
    ++checks;
  else
    expect(false, what + ": " + std::to_string(actual) + ", not " + std::to_string(expected));
}

// "linear of 3, 4" to say which case failed
std::string named(std::string text, std::initializer_list<size_t> numbers) {
  const char* before = " of ";
  for (const size_t number : numbers) text += before + std::to_string(number), before = ", ";
  return text;
}

// ---- Linear layers

// Σ x_i·w_i and Σ |x_i·w_i|, which the rounding errors go with
struct Dot {
  double value = 0, size = 0;
  Dot(const float* x, const float* w, size_t K) {
    for (size_t k = 0; k < K; ++k) value += double(x[k]) * w[k], size += std::abs(double(x[k]) * w[k]);
  }
};

void test_linear(const Kernels& kernels) {
  for (size_t M = 1; M <= 25; ++M)
    for (size_t K : {1, 3, 16, 33, 64, 131, 200})
      for (size_t N : {1, 5, 18}) {
        const bool with_bias = pick(0, 1), with_residual = pick(0, 1);
        const Floats x = normal(M * K), w = normal(N * K), bias = normal(with_bias * N),
                     residual = normal(with_residual * M * N);
        const size_t n0 = pick(0, N - 1), n1 = pick(n0, N);
        Floats y(M * N, 77);
        const Linear task{{x.data(), nullptr}, {w.data(), nullptr, 0}, data(bias), data(residual), y.data(), M, K, N};
        kernels.linear(task, n0, n1);
        const std::string what = named("linear M, K, N", {M, K, N});
        for (size_t m = 0; m < M; ++m)
          for (size_t n = 0; n < N; ++n) {
            const Dot dot(&x[m * K], &w[n * K], K);
            const double added = (with_bias ? bias[n] : 0) + (with_residual ? residual[m * N + n] : 0);
            if (n < n0 || n >= n1)
              expect(y[m * N + n] == 77, what + " wrote outside its outputs");
            else
              close(y[m * N + n], dot.value + added, 1e-6 * (1 + dot.size), what);
          }
      }
}

// Weights in blocks, as graphs/quantise.py has them, and the floats that they stand for.
struct Quantised {
  std::vector<uint8_t> q;
  Floats scales, floats;

  Quantised(size_t N, size_t K, size_t bits) : q(N * K * bits / 8), scales(normal(N * K / BLOCK)), floats(N * K) {
    for (uint8_t& byte : q) byte = static_cast<uint8_t>(pick(0, 255));
    for (size_t i = 0; i < N * K; ++i) {
      const int value = bits == 8 ? q[i] - 128 : (q[i / 2] >> i % 2 * 4 & 15) - 8;
      floats[i] = static_cast<float>(value) * scales[i / BLOCK];
    }
  }
};

// Rows of x as the kernels quantise them, and the floats that those stand for: each at most half a step from its own.
struct QuantisedRows {
  std::vector<char> bytes;
  Floats floats;

  QuantisedRows(const Kernels& kernels, const Floats& x, size_t K, size_t bits) : floats(x.size()) {
    const size_t size = quantised_bytes(K, bits);
    bytes.resize(x.size() / K * size);
    for (size_t m = 0; m < x.size() / K; ++m) kernels.quantise(&x[m * K], K, bits, &bytes[m * size]);
    for (size_t block = 0; block < x.size() / BLOCK; ++block) {
      float most = 0;
      for (size_t k = 0; k < BLOCK; ++k) most = std::max(most, std::abs(x[block * BLOCK + k]));
      const float scale = most / 127, inverse = most > 0 ? 1 / scale : 0;
      for (size_t i = block * BLOCK; i < (block + 1) * BLOCK; ++i) floats[i] = std::nearbyint(x[i] * inverse) * scale;
    }
  }
};

void test_quantised(const Kernels& kernels) {
  for (const size_t bits : {4, 8})
    for (size_t M = 1; M <= 25; ++M)
      for (size_t K : {32, 64, 96, 128, 160, 576})
        for (size_t N : {1, 5, 18}) {
          const Quantised w(N, K, bits);
          Floats x = normal(M * K);
          std::fill_n(x.begin() + static_cast<long>(pick(0, M * K / BLOCK - 1) * BLOCK), BLOCK, 0.0f);
          const QuantisedRows rows(kernels, x, K, bits);
          Floats y(M * N, 77);
          kernels.linear(
              {{x.data(), rows.bytes.data()}, {w.q.data(), w.scales.data(), bits}, nullptr, nullptr, y.data(), M, K, N}, 0, N);
          const std::string what = named("quantised linear bits, M, K, N", {bits, M, K, N});
          for (size_t m = 0; m < M; ++m)
            for (size_t n = 0; n < N; ++n) {
              const Dot dot(&rows.floats[m * K], &w.floats[n * K], K);
              close(y[m * N + n], dot.value, 1e-6 * (1 + dot.size), what);
            }
        }
}

// What is not a number stays so: a model that has gone wrong is to be seen.
void test_quantised_nan(const Kernels& kernels) {
  for (const size_t bits : {4, 8})
    for (const float odd : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
      for (size_t at = 0; at < 96; ++at) {
        const Quantised w(1, 96, bits);
        Floats x = normal(96);
        x[at] = odd;
        std::vector<char> bytes(quantised_bytes(96, bits));
        kernels.quantise(x.data(), 96, bits, bytes.data());
        float y = 0;
        kernels.linear({{x.data(), bytes.data()}, {w.q.data(), w.scales.data(), bits}, nullptr, nullptr, &y, 1, 96, 1}, 0, 1);
        expect(std::isnan(y), named("quantised NaN at", {at}));
      }
}

constexpr Activation ACTIVATIONS[] = {Activation::identity, Activation::relu, Activation::silu,
                                      Activation::sigmoid,  Activation::gelu, Activation::gelu_tanh};

double activation(double x, Activation kind) {
  switch (kind) {
    case Activation::relu:
      return std::max(x, 0.0);
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::gelu:
      return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::identity:
      break;
  }
  return x;
}

void test_gated(const Kernels& kernels) {
  for (size_t M = 1; M <= FEW_ROWS; ++M)
    for (size_t N : {1, 31, 32, 70})
      for (const Activation kind : ACTIVATIONS) {
        const size_t K = one_of({1, 7, 32, 65}), n0 = pick(0, N - 1), n1 = pick(n0, N);
        const float deviation = one_of({1, 20});  // so that gates of hundreds are among them
        const Floats x = normal(M * K, deviation), gate = normal(N * K), up = normal(N * K);
        const Floats gate_bias = normal(pick(0, 1) * N), up_bias = normal(pick(0, 1) * N);
        Floats y(M * N, 77);
        const Gated task{{x.data(), nullptr},
                         {gate.data(), nullptr, 0},
                         {up.data(), nullptr, 0},
                         data(gate_bias),
                         data(up_bias),
                         y.data(),
                         M,
                         K,
                         N,
                         kind};
        kernels.gated(task, n0, n1);
        const std::string what = named("gated M, K, N, activation", {M, K, N, size_t(kind)});
        for (size_t m = 0; m < M; ++m)
          for (size_t n = 0; n < N; ++n) {
            if (n < n0 || n >= n1) {
              expect(y[m * N + n] == 77, what + " wrote outside its outputs");
              continue;
            }
            const Dot g(&x[m * K], &gate[n * K], K), u(&x[m * K], &up[n * K], K);
            const double gated = g.value + (gate_bias.empty() ? 0 : gate_bias[n]),
                         other = u.value + (up_bias.empty() ? 0 : up_bias[n]);
            const double acted = activation(gated, kind);
            const double tolerance = 2e-6 * (1 + (1 + g.size) * (1 + std::abs(other)) + std::abs(acted) * (1 + u.size));
            close(y[m * N + n], acted * other, tolerance, what);
          }
      }
}

void test_activate(const Kernels& kernels) {
  for (const Activation kind : ACTIVATIONS) {
    const std::string what = named("activation", {size_t(kind)});
    for (size_t count = 0; count <= 70; ++count) {
      const Floats gate = normal(count, count % 2 ? 3 : 200);
      Floats up = normal(count);
      const Floats before = up;
      kernels.activate(gate.data(), up.data(), count, kind);
      for (size_t i = 0; i < count; ++i) {
        const double expected = activation(gate[i], kind) * before[i];
        close(up[i], expected, 1e-6 * (std::abs(expected) + std::abs(before[i])), what);
      }
    }
    const Floats far{-1e30f, -1e4f, -400, -178, -90, -88.5f, -87.5f, 0, 87.5f, 88.5f, 90, 178, 400, 1e4f};
    Floats up(far.size(), 1);
    kernels.activate(far.data(), up.data(), far.size(), kind);
    for (size_t i = 0; i < far.size(); ++i)
      close(up[i], activation(far[i], kind), 1e-6 * (1 + std::abs(activation(far[i], kind))), what);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    float made = 1;
    kernels.activate(&nan, &made, 1, kind);
    expect(std::isnan(made), what + " hides NaN");
  }
}

void test_normalise(const Kernels& kernels) {
  for (size_t K = 1; K <= 80; ++K) {
    const float epsilon = K % 2 ? 1e-6f : 0.5f, offset = K % 3;
    const Floats from = normal(K, 3), weight = normal(K);
    Floats to(K, 77);
    kernels.normalise({weight.data(), K, epsilon, offset}, from.data(), to.data());
    double squares = 0;
    for (const float x : from) squares += double(x) * x;
    for (size_t k = 0; k < K; ++k) {
      const double expected = from[k] / std::sqrt(squares / K + epsilon) * (offset + weight[k]);
      close(to[k], expected, 1e-6 * (1 + std::abs(expected)), named("normalise", {K}));
    }
  }
}

// sigmoid(−x) is e^−x to a float's precision for x above 17, so it shows the error of the exponential function itself.
void test_exp_of_positive_numbers(const Kernels& kernels) {
  double worst = 0;
  for (double x = 17.5; x < 87; x += 0.001) {
    const float gate = -float(x);
    float up = 1;
    kernels.activate(&gate, &up, 1, Activation::sigmoid);
    worst = std::max(worst, std::abs(up / std::exp(double(gate)) - 1));
  }
  expect(worst < 4e-7, "exp of 17 to 87 is off by " + std::to_string(worst * 1e7) + "e-7");
}

// ---- Attention

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

void test(const Kernels& kernels, const char* name, bool runs) {
  if (!runs) {
    std::printf("%s: this processor does not run it\n", name);
    return;
  }
  const long before = failures;
  checks = 0;
  expect(kernels.name == std::string(name), "its name");
  test_linear(kernels);
  test_quantised(kernels);
  test_quantised_nan(kernels);
  test_gated(kernels);
  test_activate(kernels);
  test_normalise(kernels);
  test_exp_of_positive_numbers(kernels);
  test_rotate(kernels);
  test_attend(kernels);
  test_split(kernels);
  test_exp_of_negative_numbers(kernels);
  test_extremes(kernels);
  std::printf("%s: %ld checks, %ld failed\n", name, checks, failures - before);
}

}  // namespace

int main() {
  test(headpool::plain::table, "plain", true);
#if defined(__x86_64__)
  test(headpool::avx2::table, "avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
  const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  test(headpool::avx512::table, "avx512", avx512);
  test(headpool::avx512vnni::table, "avx512vnni", avx512 && __builtin_cpu_supports("avx512vnni"));
#endif
  return failures ? 1 : 0;
}
