// The stages of a LinearChain, and a step through them with few rows, as relay.hpp hands it out to the threads.
#pragma once

#include <algorithm>
#include <iterator>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "ort.hpp"
#include "products.hpp"

namespace headpool {

constexpr size_t UNIT_BYTES = 64 << 10;    // of weights, the least that a thread takes on
constexpr size_t AHEAD_BYTES = 256 << 10;  // of weights that a thread asks for while it waits
constexpr size_t LINE = 64;
constexpr int64_t NONE = -1;

// Values are numbered: the node's inputs first, then what the stages give, in order.
struct Layer {
  size_t w;
  int64_t scales, bias;
  Matrix weights;
  const float* biases;
  size_t N, y;  // outputs, and their value; of a gated stage both layers have the same one
  std::shared_ptr<QuantisedProduct> product;
};

struct Stage {
  size_t x;
  int64_t residual, activation;  // activation: of the first of two layers, which gates the second, or of the only one
  Norm norm;                     // its weight is null where there is none
  size_t K, bits;
  std::vector<Layer> layers;
  std::vector<size_t> ends;  // of the units of its layers

  bool gated() const { return activation != NONE && layers.size() == 2; }
  bool activated() const { return activation != NONE && layers.size() == 1; }
  size_t rows_per_unit() const { return std::max<size_t>(4, UNIT_BYTES / row_bytes(K, bits) / (gated() ? 2 : 1) / 4 * 4); }
};

// y = act(y)
inline void activate(float* y, size_t count, int64_t activation) {
  float gate[256];
  for (size_t i = 0, width; i < count; i += width) {
    width = std::min(count - i, std::size(gate));
    std::copy(y + i, y + i + width, gate);
    std::fill(y + i, y + i + width, 1.0f);
    kernels().activate(gate, y + i, width, static_cast<Activation>(activation));
  }
}

// One step of a chain with few rows.
struct Step {
  const std::vector<Stage>& stages;
  const std::vector<float*>& values;
  size_t M;

  using State = Rows;  // the input of the stage, normalised and quantised as its weights are

  State enter(size_t index) {  // every thread for itself: cheaper than to wait for one
    const Stage& stage = stages[index];
    const float* x = values[stage.x];
    if (stage.norm.weight) {
      thread_local std::vector<float> memory;
      float* normed = buffer(memory, M * stage.K);
      for (size_t m = 0; m < M; ++m) kernels().normalise(stage.norm, x + m * stage.K, normed + m * stage.K);
      x = normed;
    }
    if (!stage.bits) return {x, nullptr};
    struct alignas(LINE) Line {
      char bytes[LINE];
    };
    thread_local std::vector<Line> memory;
    const size_t lines = quantised_bytes(stage.K, stage.bits) / LINE;
    Line* quantised = buffer(memory, M * lines);
    for (size_t m = 0; m < M; ++m) kernels().quantise(x + m * stage.K, stage.K, stage.bits, quantised + m * lines);
    return {x, quantised};
  }

  void run(size_t index, size_t first, size_t end, State x) {
    const Stage& stage = stages[index];
    for (size_t i = 0, before = 0; i < stage.ends.size(); before = stage.ends[i++]) {
      if (end <= before || first >= stage.ends[i]) continue;
      const Layer& layer = stage.layers[i];
      const size_t rows = stage.rows_per_unit(), n0 = (std::max(first, before) - before) * rows;
      const size_t n1 = std::min((end - before) * rows, layer.N);
      float* y = values[layer.y];
      if (stage.gated()) {
        const Layer& up = stage.layers[1];
        kernels().gated({x, layer.weights, up.weights, layer.biases, up.biases, y, M, stage.K, layer.N,
                         static_cast<Activation>(stage.activation)},
                        n0, n1);
      } else {
        const float* residual = stage.residual == NONE ? nullptr : values[stage.residual];
        kernels().linear({x, layer.weights, layer.biases, residual, y, M, stage.K, layer.N}, n0, n1);
        for (size_t m = 0; stage.activated() && m < M; ++m) activate(y + m * layer.N + n0, n1 - n0, stage.activation);
      }
    }
  }

  bool ahead(size_t index, size_t first, size_t turn) {
    constexpr size_t TOGETHER = 8;  // lines
    const Stage& stage = stages[index];
    const size_t i = std::upper_bound(stage.ends.begin(), stage.ends.end(), first) - stage.ends.begin();
    const Layer& layer = stage.layers[i];
    const size_t n = (first - (i ? stage.ends[i - 1] : 0)) * stage.rows_per_unit(), start = turn * TOGETHER * LINE;
    const size_t bytes = row_bytes(stage.K, stage.bits);
    if (start >= std::min(AHEAD_BYTES, (layer.N - n) * bytes)) return false;
    const char* from = static_cast<const char*>(layer.weights.data) + n * bytes + start;
    for (size_t line = 0; line < TOGETHER; ++line) __builtin_prefetch(from + line * LINE, 0, 2);
    return true;
  }
};

}  // namespace headpool
