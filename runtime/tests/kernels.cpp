// Every instruction set's kernels that this processor runs, against plain loops in double precision.
#include "../ops/processor.hpp"
#include "kernel_tests.hpp"

namespace {

using namespace headpool;
using namespace headpool::tests;

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
    for (size_t K : {1, 3, 16, 33, 64, 131, 200, 4101})  // the last: few rows are more than a first-level cache
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
        const size_t K = one_of({1, 7, 32, 65, 4101}), n0 = pick(0, N - 1), n1 = pick(n0, N);
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
  test_attention(kernels);
  std::printf("%s: %ld checks, %ld failed\n", name, checks, failures - before);
}

}  // namespace

int main() {
  test(headpool::plain::table, "plain", true);
#if defined(__x86_64__)
  test(headpool::avx2::table, "avx2", runs_avx2());
  test(headpool::avx512::table, "avx512", runs_avx512());
  test(headpool::avx512vnni::table, "avx512vnni", runs_avx512vnni());
#endif
  return failures ? 1 : 0;
}
