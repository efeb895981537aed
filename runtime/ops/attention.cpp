// FusedAttention: RoPE, cache update in place and grouped-query attention. graphs/patterns/fused.py says what its inputs,
// outputs and attributes are.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "ort.hpp"

namespace headpool {
namespace {

// Of a decode step: so many tasks, where each has so many cache rows. A few keep the threads busy, many keep them even.
constexpr struct {
  size_t tasks, rows;
} FEW{4, 128}, MANY{16, 512};
constexpr size_t PREFILL_ROWS = 64;      // query rows of a prefill task
constexpr int64_t MOST_HEADS = 65536;    // so that no product with a tensor's size overflows
constexpr size_t MOST_CHANNELS = 65536;  // of a head, so that sums of products of bytes do not overflow

CacheType cache_type(const Shape& shape) {
  switch (shape.type()) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return CacheType::fp16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return CacheType::int8;
    default:
      return CacheType::fp32;
  }
}

// The channels of a row of a cache; 0 where it has no room for any.
size_t channels(const Shape& shape) {
  const int64_t width = shape.back(), extra = shape.type() == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 ? SCALE_BYTES : 0;
  return width > extra ? width - extra : 0;
}

struct AttentionKernel : Kernel<AttentionKernel> {
  explicit AttentionKernel(const OrtKernelInfo* raw) {
    const Ort::ConstKernelInfo info(raw);
    const auto heads = info.GetAttribute<int64_t>("num_heads"), kv_heads = info.GetAttribute<int64_t>("kv_num_heads");
    expect(0 < kv_heads && kv_heads <= heads && heads <= MOST_HEADS && heads % kv_heads == 0,
           "headpool::FusedAttention: kv_num_heads must divide num_heads, from 1 to 65536");
    H = heads, G = kv_heads;
    scale = info.GetAttribute<float>("scale");
  }

  void compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    const auto query = context.GetInput(0), key = context.GetInput(1), value = context.GetInput(2);
    const auto past_key = context.GetInput(3), past_value = context.GetInput(4), positions = context.GetInput(5);
    const auto cos = context.GetInput(6), sin = context.GetInput(7), bias = context.GetInput(8), mask = context.GetInput(9);
    const Shape k_shape(past_key), v_shape(past_value), q_shape(query);
    expect(k_shape.rank() == 4 && v_shape.rank() == 4, "headpool::FusedAttention: a cache has a wrong rank");
    expect(k_shape.back() > 0 && v_shape.back() > 0,
           "headpool::FusedAttention: the shapes of its inputs contradict each other");
    const bool writes = key != nullptr;  // else it only reads the cache, all of it
    const Shape tokens = positions ? Shape(positions) : Shape();
    expect(writes == (value != nullptr) && writes == (positions != nullptr) && (!writes || tokens.rank() == 2),
           "headpool::FusedAttention: key, value and position_ids [B,T] belong together");
    Attention a{};
    a.query = floats(query);
    a.B = k_shape[0], a.S = k_shape[2], a.H = H, a.G = G, a.D = channels(k_shape), a.Dv = channels(v_shape);
    a.T = writes ? tokens.back() : q_shape.elements() / std::max<size_t>(1, a.B * H * a.D);
    a.cache = cache_type(k_shape);
    expect(a.D <= MOST_CHANNELS, "headpool::FusedAttention: a head has more than 65536 channels");
    a.scale = scale;
    a.cos = floats(cos), a.sin = floats(sin);
    expect(!a.cos == !a.sin, "headpool::FusedAttention: cos or sin is missing");
    const size_t rows = a.B * a.T;
    if (a.cos) {
      const Shape angles(cos);
      expect(angles.rank() == 3, "headpool::FusedAttention: cos or sin has a wrong rank");
      a.rotary = 2 * angles.back();
      expect(a.rotary <= a.D && angles.elements() == rows * a.rotary / 2 && Shape(sin).elements() == angles.elements(),
             "headpool::FusedAttention: cos or sin does not fit the other inputs");
    }
    expect(static_cast<size_t>(k_shape[1]) == G && v_shape[0] == k_shape[0] && v_shape[1] == k_shape[1] &&
               v_shape[2] == k_shape[2] && q_shape.elements() == rows * H * a.D,
           "headpool::FusedAttention: the shapes of its inputs contradict each other");
    if (bias) read_bias(bias, a);
    if (mask) {
      expect(Shape(mask).is({k_shape[0], k_shape[2]}), "headpool::FusedAttention: attention_mask must be [B,S]");
      a.kept = mask.GetTensorData<int64_t>();
    }
    const auto count = static_cast<int64_t>(rows), width = static_cast<int64_t>(H * a.Dv);
    const int64_t flat[] = {count, width}, deep[] = {k_shape[0], static_cast<int64_t>(a.T), width};
    auto output = q_shape.rank() == 2 ? context.GetOutput(0, flat, 2) : context.GetOutput(0, deep, 3);
    a.output = output.GetTensorMutableData<float>();
    if (writes) {
      write(context, a, {key, value, past_key, past_value, positions, k_shape, v_shape, tokens});
    } else {
      a.keys = static_cast<const char*>(past_key.GetTensorRawData());
      a.values = static_cast<const char*>(past_value.GetTensorRawData());
      thread_local std::vector<int64_t> last;
      a.positions = std::fill_n(buffer(last, rows), rows, k_shape[2] - 1) - rows;
    }
    if (rows) a.T == 1 ? decode(context, a) : prefill(context, a);
  }

 private:
  struct New {
    const Ort::ConstValue &key, &value, &past_key, &past_value, &positions;
    const Shape &k_shape, &v_shape, &tokens;  // of the caches and of positions
  };

  // [B or 1,H or 1,T or 1,S]
  static void read_bias(const Ort::ConstValue& bias, Attention& a) {
    const Shape shape(bias);
    const size_t full[] = {a.B, a.H, a.T};
    expect(shape.rank() == 4 && static_cast<size_t>(shape[3]) == a.S, "headpool::FusedAttention: bias has a wrong shape");
    size_t step = a.S;
    for (size_t i = 3; i-- > 0; step *= shape[i]) {
      expect(shape[i] == 1 || static_cast<size_t>(shape[i]) == full[i], "headpool::FusedAttention: bias has a wrong shape");
      a.bias_steps[i] = shape[i] == 1 ? 0 : step;
    }
    a.bias = floats(bias);
  }

  // The new rows into the cache.
  static void write(const Ort::KernelContext& context, Attention& a, const New& given) {
    const Shape &k_shape = given.k_shape, &v_shape = given.v_shape, &tokens = given.tokens;
    expect(tokens.rank() == 2 && static_cast<size_t>(tokens[0]) == a.B &&
               Shape(given.key).elements() == a.B * a.T * a.G * a.D && Shape(given.value).elements() == a.B * a.T * a.G * a.Dv,
           "headpool::FusedAttention: the shapes of its inputs contradict each other");
    char* keys = in_place(given.past_key, context.GetOutput(1, k_shape.data(), 4), k_shape);
    char* values = in_place(given.past_value, context.GetOutput(2, v_shape.data(), 4), v_shape);
    a.keys = keys, a.values = values, a.positions = given.positions.GetTensorData<int64_t>();
    if (!a.T) return;
    for (size_t b = 0; b < a.B; ++b) {
      const int64_t* row = a.positions + b * a.T;
      const auto [least, most] = std::minmax_element(row, row + a.T);
      expect(*least >= 0 && *most < k_shape[2] && row[0] <= k_shape[2] - tokens[1],
             "headpool::FusedAttention: a position lies outside the cache");
    }
    update(context, a, floats(given.key), floats(given.value), keys, values);
  }

  // The cache is written where it lies when the caller bound one buffer as input and as output; else it is copied first.
  static char* in_place(const Ort::ConstValue& past, Ort::UnownedValue present, const Shape& shape) {
    char* to = static_cast<char*>(present.GetTensorMutableRawData());
    const void* from = past.GetTensorRawData();
    if (to != from)
      std::memcpy(to, from, shape.elements() / shape.back() * cache_row_bytes(cache_type(shape), channels(shape)));
    return to;
  }

  static void update(const Ort::KernelContext& context, const Attention& a, const float* key, const float* value, char* keys,
                     char* values) {
    const size_t rows = a.B * a.T, half = a.rotary / 2, step = 16;
    const size_t key_row = cache_row_bytes(a.cache, a.D), value_row = cache_row_bytes(a.cache, a.Dv);
    parallel(context, divide_up(rows, step), [&](size_t task) {
      thread_local std::vector<float> memory;
      float* const rotated = buffer(memory, a.cos ? a.D : 0);
      for (size_t token = task * step; token < std::min(rows, (task + 1) * step); ++token) {
        const size_t b = token / a.T, s = a.positions[b * a.T] + token % a.T;
        for (size_t g = 0; g < a.G; ++g) {
          const float* k = key + (token * a.G + g) * a.D;
          if (a.cos) {
            kernels().rotate(rotated, k, a.cos + token * half, a.sin + token * half, a.D, a.rotary);
            k = rotated;
          }
          const size_t row = (b * a.G + g) * a.S + s;
          kernels().keep(a.cache, k, a.D, keys + row * key_row);
          kernels().keep(a.cache, value + (token * a.G + g) * a.Dv, a.Dv, values + row * value_row);
        }
      }
    });
  }

  static void prefill(const Ort::KernelContext& context, const Attention& a) {
    const size_t shared = divide_up(a.B * a.G * a.T, FEW.tasks);  // of few tokens and groups: a part for every thread
    const size_t step = std::clamp<size_t>(PREFILL_ROWS / (a.H / a.G), 1, shared), blocks = divide_up(a.T, step);
    parallel(context, a.B * a.G * blocks, [&](size_t task) {
      const size_t block = blocks - 1 - task % blocks;  // the longest first: the threads end together
      const size_t b = task / blocks / a.G, t0 = block * step, t1 = std::min(a.T, t0 + step);
      const int64_t* row = a.positions + b * a.T;
      const size_t end = 1 + *std::max_element(row + t0, row + t1);
      attend(a, {b, task / blocks % a.G, t0, t1, 0, end, nullptr, nullptr, nullptr});
    });
  }

  static void attend(const Attention& a, const Tile& tile) {
    thread_local std::vector<float> memory;
    kernels().attend(a, tile, buffer(memory, kernels().scratch_floats(a, tile)));
  }

  // One token a sequence: where the groups are few, the cache rows are split too and the parts merged by who ends the last.
  static void decode(const Ort::KernelContext& context, const Attention& a) {
    const size_t groups = a.B * a.G, R = a.H / a.G;
    const size_t longest = 1 + std::max<int64_t>(0, *std::max_element(a.positions, a.positions + a.B));
    const size_t most = divide_up(MANY.tasks, groups);
    size_t wanted = 1;
    for (const auto& [tasks, rows] : {FEW, MANY}) wanted = std::max(wanted, std::min(divide_up(tasks, groups), longest / rows));
    const size_t step = divide_up(divide_up(longest, wanted), 16) * 16, splits = divide_up(longest, step);
    thread_local std::vector<float> memory;  // maximum, sum and output of each row of each task; from the start for any length
    thread_local std::vector<size_t> open;   // tasks of each group
    float* const parts = buffer(memory, most > 1 ? groups * most * R * (2 + a.Dv) : 0);
    size_t* const left = buffer(open, most > 1 ? groups : 0);
    if (splits == 1) {
      parallel(context, groups, [&](size_t task) {
        const size_t b = task / a.G;
        attend(a, {b, task % a.G, 0, 1, 0, static_cast<size_t>(a.positions[b] + 1), nullptr, nullptr, nullptr});
      });
      return;
    }
    std::fill_n(left, groups, splits);
    const size_t rows = groups * splits * R;
    float *maximum = parts, *sum = maximum + rows, *partial = sum + rows;
    parallel(context, groups * splits, [&](size_t task) {
      const size_t b = task / splits / a.G, used = a.positions[b] + 1;
      const size_t s0 = std::min(used, task % splits * step), s1 = std::min(used, s0 + step), row = task * R;
      attend(a, {b, task / splits % a.G, 0, 1, s0, s1, maximum + row, sum + row, partial + row * a.Dv});
      const size_t group = task / splits;
      if (std::atomic_ref(left[group]).fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      for (size_t r = 0; r < R; ++r) merge(a, group, r, splits, R, maximum, sum, partial);
    });
  }

  static void merge(const Attention& a, size_t group, size_t r, size_t splits, size_t R, const float* maximum, const float* sum,
                    const float* partial) {
    const auto row = [&](size_t split) { return (group * splits + split) * R + r; };
    float top = maximum[row(0)], total = 0;
    for (size_t i = 1; i < splits; ++i) top = std::max(top, maximum[row(i)]);
    float* to = a.output + (group * R + r) * a.Dv;  // [B,1,H,Dv]: head g·R + r of sequence b is row group·R + r
    std::fill(to, to + a.Dv, 0.0f);
    for (size_t i = 0; i < splits; ++i) {
      const float weight = sum[row(i)] == 0 ? 0 : std::exp(maximum[row(i)] - top);
      total += weight * sum[row(i)];
      for (size_t d = 0; d < a.Dv; ++d) to[d] += weight * partial[row(i) * a.Dv + d];
    }
    for (size_t d = 0; d < a.Dv; ++d) to[d] /= total;
  }

  size_t H, G;
  float scale;
};

// One for each type of the caches, which ONNX Runtime chooses from.
template <ONNXTensorElementDataType CACHE>
struct AttentionOp : Operator<AttentionOp<CACHE>, AttentionKernel> {
  const char* GetName() const { return "FusedAttention"; }
  size_t GetInputTypeCount() const { return 10; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    if (i == 3 || i == 4) return CACHE;
    return i == 5 || i == 9 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i == 0 || i == 3 || i == 4 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t i) const {
    return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  size_t GetOutputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetOutputType(size_t i) const { return i ? CACHE : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

template <ONNXTensorElementDataType CACHE>
const OrtCustomOp* with_cache() {
  static const AttentionOp<CACHE> op;
  return &op;
}

}  // namespace

std::array<const OrtCustomOp*, 3> attention_operators() {
  return {with_cache<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(), with_cache<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(),
          with_cache<ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8>()};
}

}  // namespace headpool
