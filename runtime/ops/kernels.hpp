// What the operators compute, apart from ONNX Runtime: one table of functions an instruction set, chosen once at load.
//
// Letters: B batch, T new tokens a sequence, S rows of the cache, H query heads, G KV heads, R = H/G query heads a group,
// D channels of a K head, Dv of a V head, K and N inputs and outputs of a linear layer, M its rows (B·T).
#pragma once

#include <cstddef>
#include <cstdint>

namespace headpool {

enum class Activation { identity, relu, silu, sigmoid, gelu, gelu_tanh };

constexpr int ACTIVATIONS = 6;
constexpr size_t FEW_ROWS = 24;  // rows of x up to which a linear layer is bound by reading its weights

// The weights of a linear layer, [N,K]: floats, or q in blocks of BLOCK inputs, w = (q − 2^(bits−1)) · scale
// (graphs/quantise.py).
constexpr size_t BLOCK = 32;

struct Matrix {
  const void* data;
  const float* scales;  // [N,K/BLOCK]
  size_t bits;          // 4, 8, or 0 of floats
};

static constexpr size_t row_bytes(size_t K, size_t bits) { return bits ? K * bits / 8 : K * sizeof(float); }

// What a row of x is made for such weights: int8 in blocks of BLOCK that share a scale, too. What meets GROUP_BYTES of q lies
// together.
constexpr size_t GROUP_BYTES = 64;

template <size_t BITS>
struct Group {
  float scales[GROUP_BYTES / 4];         // of the block that 4 bytes of q belong to
  int32_t start[GROUP_BYTES / 4];        // −2^(BITS−1) · Σ of the values that meet those
  int8_t values[8 / BITS][GROUP_BYTES];  // of 4 bits: those that meet the low halves, then the high ones
};

static constexpr size_t groups(size_t K, size_t bits) { return (K * bits / 8 + GROUP_BYTES - 1) / GROUP_BYTES; }
static constexpr size_t quantised_bytes(size_t K, size_t bits) {
  return groups(K, bits) * (bits == 4 ? sizeof(Group<4>) : sizeof(Group<8>));
}

// Rows of x, [M,K].
struct Rows {
  const float* floats;
  const void* quantised;  // a row each quantised_bytes(K, bits), where the weights are quantised
};

// y[M,N] = x[M,K] · wᵀ (+ bias[N]) (+ residual[M,N]), w [N,K]; all row-major and dense.
struct Linear {
  Rows x;
  Matrix w;
  const float* bias;      // or null
  const float* residual;  // or null
  float* y;
  size_t M, K, N;
};

// M ≤ FEW_ROWS: y[M,N] = act(x · gateᵀ + gate_bias) ⊙ (x · upᵀ + up_bias)
struct Gated {
  Rows x;
  Matrix gate, up;
  const float *gate_bias, *up_bias;  // or null
  float* y;
  size_t M, K, N;
  Activation activation;
};

// RMSNorm of rows of K: x / √(mean x² + epsilon) ⊙ (offset + weight)
struct Norm {
  const float* weight;
  size_t K;
  float epsilon, offset;
};

// What the rows of a cache are stored as: floats, halves, or int8 values followed by the float that all of them are times.
enum class CacheType { fp32, fp16, int8 };

constexpr size_t SCALE_BYTES = sizeof(float);

static constexpr size_t cache_row_bytes(CacheType type, size_t size) {
  return type == CacheType::int8 ? size + SCALE_BYTES : size * (type == CacheType::fp16 ? 2 : sizeof(float));
}

// Grouped-query attention of T new tokens over a cache that already holds their keys and values.
struct Attention {
  const float* query;         // [B,T,H,D], not rotated
  const char *keys, *values;  // rows of D and of Dv channels: [B,G,S], each of cache_row_bytes
  CacheType cache;
  const int64_t* positions;  // [B,T]: query t of row b sees cache rows ≤ positions[b,t]
  const float *cos, *sin;    // [B,T,rotary/2], or null
  const float* bias;         // added to the scores, or null: of row s, head h, token t and sequence b it is at
  size_t bias_steps[3];      // b · [0] + h · [1] + t · [2] + s
  const int64_t* kept;       // [B,S]: 0 where no query sees the cache row; or null
  float* output;             // [B,T,H,Dv]
  size_t B, T, S, H, G, D, Dv, rotary;
  float scale;
};

// A part of the work that one thread does: query tokens [t0,t1) of group g of sequence b against cache rows [s0,s1).
struct Tile {
  size_t b, g, t0, t1, s0, s1;
  // Where a row's cache rows are split over tiles: its maximum, its sum and its unnormalised output; else null.
  float *maximum, *sum, *partial;  // [R·(t1−t0)], [R·(t1−t0)], [R·(t1−t0),Dv]
};

struct Kernels {
  const char* name;
  void (*linear)(const Linear&, size_t n0, size_t n1);  // outputs [n0,n1)
  void (*gated)(const Gated&, size_t n0, size_t n1);
  void (*activate)(const float* gate, float* up, size_t count, Activation);  // up = act(gate) ⊙ up
  void (*normalise)(const Norm&, const float* from, float* to);              // of one row
  void (*quantise)(const float* from, size_t K, size_t bits, void* to);      // of one row, K a multiple of BLOCK
  void (*rotate)(float* to, const float* from, const float* cos, const float* sin, size_t D, size_t rotary);  // one head
  void (*keep)(CacheType, const float* from, size_t size, char* row);  // a row of the cache, rounded to the nearest
  void (*attend)(const Attention&, const Tile&, float* scratch);
  size_t (*scratch_floats)(const Attention&, const Tile&);
};

const Kernels& kernels();  // the best this processor runs

// How memory is asked for a linear layer's weights: how far ahead of what is read, and whether as lines that are read but once.
struct Asking {
  size_t floats_ahead;
  bool once;
};

extern const Asking asking;

}  // namespace headpool
