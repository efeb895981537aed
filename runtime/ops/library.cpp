// headpool's operators as an ONNX Runtime custom-operator library: domain "headpool", fp32, CPU.
//
//   FusedAttention  RoPE, cache update in place and grouped-query attention: reads the cache's used rows once a group
//   Linear          several linear layers of one input, each x · wᵀ (+ bias), or one with a residual added
//   GatedLinear     act(x · gateᵀ) ⊙ (x · upᵀ)
//
// Inputs, outputs and attributes are described in graphs/patterns/fused.py and graphs/linear.py, which write these nodes.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace headpool {
namespace {

constexpr size_t TASK_BYTES = 256 << 10;  // weights that a thread reads before it asks for more: even work, long streams
constexpr size_t SPLIT_ROWS = 512;        // cache rows of a decode task at least; shorter ones cost more than they balance
constexpr size_t PREFILL_ROWS = 64;       // query rows of a prefill task
constexpr size_t TASKS = 16;              // tasks of a decode step that are enough to keep the threads even

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

template <class F>
void parallel(const Ort::KernelContext& context, size_t total, const F& work) {
  if (total == 1) return work(0);
  context.ParallelFor([](void* f, size_t i) { (*static_cast<const F*>(f))(i); }, total, 0, const_cast<F*>(&work));
}

const float* floats(const Ort::ConstValue& value) { return value ? value.GetTensorData<float>() : nullptr; }

std::vector<int64_t> shape(const Ort::ConstValue& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// ONNX Runtime's own Gemm(transB=1): for many rows of x, where arithmetic bounds and not memory.
class Gemm {
 public:
  Gemm(const OrtKernelInfo* info, bool bias) : bias_(bias) {
    const float one = 1;
    const int64_t no = 0, yes = 1;
    Ort::OpAttr attributes[] = {Ort::OpAttr("alpha", &one, 1, ORT_OP_ATTR_FLOAT),
                                Ort::OpAttr("beta", &one, 1, ORT_OP_ATTR_FLOAT), Ort::OpAttr("transA", &no, 1, ORT_OP_ATTR_INT),
                                Ort::OpAttr("transB", &yes, 1, ORT_OP_ATTR_INT)};
    const char* names[] = {"T"};
    const ONNXTensorElementDataType types[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};
    op_ = Ort::Op::Create(info, "Gemm", "", 13, names, types, 1, attributes, 4, bias ? 3 : 2, 1);
  }

  void operator()(const OrtKernelContext* context, const OrtValue* x, const OrtValue* w, const OrtValue* bias, OrtValue* y) {
    const OrtValue* inputs[] = {x, w, bias};
    OrtValue* outputs[] = {y};
    op_.Invoke(context, inputs, bias_ ? 3 : 2, outputs, 1);
  }

 private:
  bool bias_;
  Ort::Op op_{nullptr};
};

template <class Derived>
struct Kernel {
  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    try {
      static_cast<Derived*>(this)->compute(context);
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }
};

template <class Op, class K>
struct Operator : Ort::CustomOpBase<Op, K, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    try {
      *kernel = std::make_unique<K>(info).release();
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
  }
};

// Each row of x divided by its root mean square and multiplied by the norm's weight; nothing where the node has no norm.
std::optional<Ort::Value> normalise(const Ort::KernelContext& context, const Ort::ConstValue& x, const Ort::ConstValue& weight,
                                    float epsilon) {
  if (!weight) return std::nullopt;
  const auto x_shape = shape(x);
  const size_t M = x_shape[0], K = x_shape[1], step = std::max<size_t>(1, TASK_BYTES / (K * sizeof(float)));
  expect(shape(weight) == std::vector<int64_t>{x_shape[1]}, "headpool: the weight of a norm does not fit x");
  Ort::AllocatorWithDefaultOptions allocator;
  auto normed = Ort::Value::CreateTensor<float>(allocator, x_shape.data(), x_shape.size());
  float* to = normed.GetTensorMutableData<float>();
  const float *from = floats(x), *scale = floats(weight);
  if (M)
    parallel(context, divide_up(M, step), [&](size_t task) {
      for (size_t m = task * step; m < std::min(M, (task + 1) * step); ++m)
        kernels().normalise(to + m * K, from + m * K, scale, K, epsilon);
    });
  return normed;
}

// ---- Linear: x [M,K], residual [M,N]?, norm [K]?, then weights [N_i,K] and, with `bias`, as many biases [N_i] → y_i [M,N_i]

struct LinearKernel : Kernel<LinearKernel> {
  explicit LinearKernel(const OrtKernelInfo* info)
      : bias(Ort::ConstKernelInfo(info).GetAttribute<int64_t>("bias") != 0),
        epsilon(Ort::ConstKernelInfo(info).GetAttribute<float>("epsilon")),
        gemm(info, bias) {}

  void compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    const size_t count = context.GetOutputCount();
    expect(context.GetInputCount() == FIRST + (bias ? 2 : 1) * count, "headpool::Linear: weights and outputs differ in number");
    const auto x = context.GetInput(0), residual = context.GetInput(1);
    const auto x_shape = shape(x);
    expect(x_shape.size() == 2, "headpool::Linear: x must have two dimensions");
    const size_t M = x_shape[0], K = x_shape[1];
    const auto normed = normalise(context, x, context.GetInput(2), epsilon);
    const OrtValue* source = normed ? static_cast<const OrtValue*>(*normed) : static_cast<const OrtValue*>(x);

    std::vector<Linear> parts;
    std::vector<Ort::UnownedValue> outputs;
    std::vector<size_t> ends;  // of the tasks of each part
    for (size_t i = 0; i < count; ++i) {
      const auto w = context.GetInput(FIRST + i);
      const auto w_shape = shape(w);
      expect(w_shape.size() == 2 && static_cast<size_t>(w_shape[1]) == K, "headpool::Linear: a weight does not fit x");
      const size_t N = w_shape[0];
      outputs.push_back(context.GetOutput(i, {x_shape[0], w_shape[0]}));
      const float* b = bias ? floats(context.GetInput(FIRST + count + i)) : nullptr;
      parts.push_back(
          {floats(Ort::ConstValue(source)), floats(w), b, floats(residual), outputs[i].GetTensorMutableData<float>(), M, K, N});
      ends.push_back((i ? ends[i - 1] : 0) + divide_up(N, rows_per_task(K)));
    }
    if (residual)
      expect(count == 1 && shape(residual) == std::vector<int64_t>{x_shape[0], shape(context.GetInput(FIRST))[0]},
             "headpool::Linear: the residual does not fit the output");
    if (M > FEW_ROWS) return many_rows(context, raw, source, parts, outputs);
    parallel(context, ends.back(), [&](size_t task) {
      const size_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
      const size_t rows = rows_per_task(K), n = (task - (i ? ends[i - 1] : 0)) * rows;
      kernels().linear(parts[i], n, std::min(n + rows, parts[i].N));
    });
  }

  static size_t rows_per_task(size_t K) { return std::max<size_t>(4, TASK_BYTES / (K * sizeof(float)) / 4 * 4); }

 private:
  void many_rows(const Ort::KernelContext& context, OrtKernelContext* raw, const OrtValue* x, const std::vector<Linear>& parts,
                 const std::vector<Ort::UnownedValue>& outputs) {
    for (size_t i = 0; i < parts.size(); ++i) {
      const OrtValue* b = bias ? static_cast<const OrtValue*>(context.GetInput(FIRST + parts.size() + i)) : nullptr;
      gemm(raw, x, context.GetInput(FIRST + i), b, outputs[i]);
      const Linear& part = parts[i];
      if (!part.residual) continue;
      const size_t total = part.M * part.N, step = TASK_BYTES / sizeof(float);
      parallel(context, divide_up(total, step), [&](size_t task) {
        for (size_t j = task * step, end = std::min(total, j + step); j < end; ++j) part.y[j] += part.residual[j];
      });
    }
  }

  static constexpr size_t FIRST = 3;  // of the weights among the inputs
  bool bias;
  float epsilon;
  Gemm gemm;
};

struct LinearOp : Operator<LinearOp, LinearKernel> {
  const char* GetName() const { return "Linear"; }
  size_t GetInputTypeCount() const { return 4; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i == 0 ? INPUT_OUTPUT_REQUIRED : i < 3 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_VARIADIC;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
};

// ---- GatedLinear: x [M,K], gate [N,K], up [N,K], gate_bias [N]?, up_bias [N]?, norm [K]? → [M,N]

struct GatedKernel : Kernel<GatedKernel> {
  explicit GatedKernel(const OrtKernelInfo* info)
      : activation(activation_of(Ort::ConstKernelInfo(info).GetAttribute<std::string>("activation"))),
        epsilon(Ort::ConstKernelInfo(info).GetAttribute<float>("epsilon")),
        gemm(info, false),
        gemm_bias(info, true) {}

  void compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    const auto x = context.GetInput(0), gate = context.GetInput(1), up = context.GetInput(2);
    const auto gate_bias = context.GetInput(3), up_bias = context.GetInput(4);
    const auto x_shape = shape(x), w_shape = shape(gate);
    expect(x_shape.size() == 2 && w_shape.size() == 2 && w_shape[1] == x_shape[1] && shape(up) == w_shape,
           "headpool::GatedLinear: the weights do not fit x");
    const auto normed = normalise(context, x, context.GetInput(5), epsilon);
    const OrtValue* source = normed ? static_cast<const OrtValue*>(*normed) : static_cast<const OrtValue*>(x);
    const std::vector<int64_t> y_shape{x_shape[0], w_shape[0]};
    auto y = context.GetOutput(0, y_shape);
    const Gated part{floats(Ort::ConstValue(source)),
                     floats(gate),
                     floats(up),
                     floats(gate_bias),
                     floats(up_bias),
                     y.GetTensorMutableData<float>(),
                     static_cast<size_t>(x_shape[0]),
                     static_cast<size_t>(x_shape[1]),
                     static_cast<size_t>(w_shape[0]),
                     activation};
    if (part.M <= FEW_ROWS) {
      const size_t rows = LinearKernel::rows_per_task(2 * part.K);
      parallel(context, divide_up(part.N, rows),
               [&](size_t task) { kernels().gated(part, task * rows, std::min((task + 1) * rows, part.N)); });
      return;
    }
    Ort::AllocatorWithDefaultOptions allocator;
    auto gates = Ort::Value::CreateTensor<float>(allocator, y_shape.data(), y_shape.size());
    (gate_bias ? gemm_bias : gemm)(raw, source, gate, gate_bias, gates);
    (up_bias ? gemm_bias : gemm)(raw, source, up, up_bias, y);
    const size_t total = part.M * part.N, step = TASK_BYTES / sizeof(float) / 4;
    const float* from = gates.GetTensorData<float>();
    parallel(context, divide_up(total, step), [&](size_t task) {
      const size_t i = task * step;
      kernels().activate(from + i, part.y + i, std::min(step, total - i), activation);
    });
  }

  static Activation activation_of(const std::string& name) {
    constexpr std::pair<const char*, Activation> known[] = {
        {"identity", Activation::identity}, {"relu", Activation::relu}, {"silu", Activation::silu},
        {"sigmoid", Activation::sigmoid},   {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh}};
    for (const auto& [text, kind] : known)
      if (name == text) return kind;
    throw std::invalid_argument("headpool::GatedLinear: unknown activation " + name);
  }

  Activation activation;
  float epsilon;
  Gemm gemm, gemm_bias;
};

struct GatedOp : Operator<GatedOp, GatedKernel> {
  const char* GetName() const { return "GatedLinear"; }
  size_t GetInputTypeCount() const { return 6; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i < 3 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

// ---- FusedAttention: query of 2 or 3 dimensions, key, value, past_key [B,G,S,D], past_value [B,G,S,Dv], position_ids [B,T],
//      cos [B,T,rotary/2]?, sin? → output [B·T,H·Dv] or [B,T,H·Dv], as many dimensions as query has, present_key, present_value

struct AttentionKernel : Kernel<AttentionKernel> {
  explicit AttentionKernel(const OrtKernelInfo* raw) {
    const Ort::ConstKernelInfo info(raw);
    H = info.GetAttribute<int64_t>("num_heads");
    G = info.GetAttribute<int64_t>("kv_num_heads");
    scale = info.GetAttribute<float>("scale");
    expect(H > 0 && G > 0 && H % G == 0, "headpool::FusedAttention: kv_num_heads must divide num_heads");
  }

  void compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    const auto query = context.GetInput(0), key = context.GetInput(1), value = context.GetInput(2);
    const auto past_key = context.GetInput(3), past_value = context.GetInput(4), positions = context.GetInput(5);
    const auto cos = context.GetInput(6), sin = context.GetInput(7);
    const auto k_shape = shape(past_key), v_shape = shape(past_value), tokens = shape(positions);
    expect(k_shape.size() == 4 && v_shape.size() == 4 && tokens.size() == 2,
           "headpool::FusedAttention: a cache or position_ids has a wrong rank");
    Attention a{};
    a.query = floats(query);
    a.B = tokens[0], a.T = tokens[1], a.S = k_shape[2], a.H = H, a.G = G, a.D = k_shape[3], a.Dv = v_shape[3];
    a.positions = positions.GetTensorData<int64_t>();
    a.scale = scale;
    a.cos = floats(cos), a.sin = floats(sin);
    expect(!a.cos == !a.sin && (!a.cos || shape(cos).size() == 3),
           "headpool::FusedAttention: cos or sin is missing or has a wrong rank");
    if (a.cos) a.rotary = 2 * shape(cos).back();
    const auto elements = [](const Ort::ConstValue& v) { return v.GetTensorTypeAndShapeInfo().GetElementCount(); };
    const size_t rows = a.B * a.T;
    expect(static_cast<size_t>(k_shape[0]) == a.B && static_cast<size_t>(k_shape[1]) == G && v_shape[0] == k_shape[0] &&
               v_shape[1] == k_shape[1] && v_shape[2] == k_shape[2] && elements(query) == rows * H * a.D &&
               elements(key) == rows * G * a.D && elements(value) == rows * G * a.Dv && a.rotary <= a.D &&
               (!a.cos || (elements(cos) == rows * a.rotary / 2 && elements(sin) == elements(cos))),
           "headpool::FusedAttention: the shapes of its inputs contradict each other");
    std::vector<int64_t> out{tokens[0], tokens[1], static_cast<int64_t>(H * a.Dv)};
    if (shape(query).size() == 2) out = {tokens[0] * tokens[1], out[2]};
    a.output = context.GetOutput(0, out).GetTensorMutableData<float>();
    float* keys = in_place(past_key, context.GetOutput(1, k_shape));
    float* values = in_place(past_value, context.GetOutput(2, v_shape));
    a.keys = keys, a.values = values;
    if (!rows) return;
    for (size_t b = 0; b < a.B; ++b) {
      const int64_t* row = a.positions + b * a.T;
      const auto [least, most] = std::minmax_element(row, row + a.T);
      expect(*least >= 0 && *most < k_shape[2] && row[0] <= k_shape[2] - tokens[1],
             "headpool::FusedAttention: a position lies outside the cache");
    }
    update(context, a, floats(key), floats(value), keys, values);
    a.T == 1 ? decode(context, a) : prefill(context, a);
  }

 private:
  // The cache is written where it lies when the caller bound one buffer as input and as output; else it is copied first.
  static float* in_place(const Ort::ConstValue& past, Ort::UnownedValue present) {
    float* to = present.GetTensorMutableData<float>();
    const float* from = past.GetTensorData<float>();
    if (to != from) std::memcpy(to, from, past.GetTensorTypeAndShapeInfo().GetElementCount() * sizeof(float));
    return to;
  }

  static void update(const Ort::KernelContext& context, const Attention& a, const float* key, const float* value, float* keys,
                     float* values) {
    const size_t rows = a.B * a.T, half = a.rotary / 2, step = 16;
    parallel(context, divide_up(rows, step), [&](size_t task) {
      for (size_t token = task * step; token < std::min(rows, (task + 1) * step); ++token) {
        const size_t b = token / a.T, s = a.positions[b * a.T] + token % a.T;
        for (size_t g = 0; g < a.G; ++g) {
          const float* k = key + (token * a.G + g) * a.D;
          float* to = keys + ((b * a.G + g) * a.S + s) * a.D;
          if (a.cos)
            kernels().rotate(to, k, a.cos + token * half, a.sin + token * half, a.D, a.rotary);
          else
            std::copy(k, k + a.D, to);
          const float* v = value + (token * a.G + g) * a.Dv;
          std::copy(v, v + a.Dv, values + ((b * a.G + g) * a.S + s) * a.Dv);
        }
      }
    });
  }

  static void prefill(const Ort::KernelContext& context, const Attention& a) {
    const size_t step = std::max<size_t>(1, PREFILL_ROWS / (a.H / a.G)), blocks = divide_up(a.T, step);
    parallel(context, a.B * a.G * blocks, [&](size_t task) {
      const size_t block = blocks - 1 - task % blocks;  // the longest first: the threads end together
      const size_t b = task / blocks / a.G, t0 = block * step, t1 = std::min(a.T, t0 + step);
      const int64_t* row = a.positions + b * a.T;
      const size_t end = 1 + *std::max_element(row + t0, row + t1);
      attend(a, {b, task / blocks % a.G, t0, t1, 0, end, nullptr, nullptr, nullptr});
    });
  }

  static void attend(const Attention& a, const Tile& tile) {
    thread_local std::vector<float> scratch;  // kept from step to step
    scratch.resize(kernels().scratch_floats(a, tile));
    kernels().attend(a, tile, scratch.data());
  }

  // One token a sequence: where the groups are few, the cache rows are split too and the parts merged.
  static void decode(const Ort::KernelContext& context, const Attention& a) {
    const size_t groups = a.B * a.G, R = a.H / a.G;
    const size_t longest = 1 + *std::max_element(a.positions, a.positions + a.B);
    const size_t splits = std::clamp<size_t>(divide_up(TASKS, groups), 1, std::max<size_t>(1, longest / SPLIT_ROWS));
    if (splits == 1) {
      parallel(context, groups, [&](size_t task) {
        const size_t b = task / a.G;
        attend(a, {b, task % a.G, 0, 1, 0, static_cast<size_t>(a.positions[b] + 1), nullptr, nullptr, nullptr});
      });
      return;
    }
    thread_local std::vector<float> parts;  // maximum, sum and output of each row of each task
    const size_t rows = groups * splits * R;
    parts.resize(rows * (2 + a.Dv));
    float *maximum = parts.data(), *sum = maximum + rows, *partial = sum + rows;
    parallel(context, groups * splits, [&](size_t task) {
      const size_t b = task / splits / a.G, used = a.positions[b] + 1, step = divide_up(divide_up(used, splits), 64) * 64;
      const size_t s0 = std::min(used, task % splits * step), s1 = std::min(used, s0 + step), row = task * R;
      attend(a, {b, task / splits % a.G, 0, 1, s0, s1, maximum + row, sum + row, partial + row * a.Dv});
    });
    for (size_t group = 0; group < groups; ++group)
      for (size_t r = 0; r < R; ++r) merge(a, group, r, splits, R, maximum, sum, partial);
  }

  static void merge(const Attention& a, size_t group, size_t r, size_t splits, size_t R, const float* maximum, const float* sum,
                    const float* partial) {
    const auto row = [&](size_t split) { return (group * splits + split) * R + r; };
    float top = maximum[row(0)], total = 0;
    for (size_t i = 1; i < splits; ++i) top = std::max(top, maximum[row(i)]);
    float* to = a.output + (group * R + r) * a.Dv;  // [B,1,H,Dv]: head g·R + r of sequence b is row group·R + r
    std::fill(to, to + a.Dv, 0.0f);
    for (size_t i = 0; i < splits; ++i) {
      const float weight = sum[row(i)] > 0 ? std::exp(maximum[row(i)] - top) : 0;
      total += weight * sum[row(i)];
      for (size_t d = 0; d < a.Dv; ++d) to[d] += weight * partial[row(i) * a.Dv + d];
    }
    for (size_t d = 0; d < a.Dv; ++d) to[d] /= total;
  }

  size_t H, G;
  float scale;
};

struct AttentionOp : Operator<AttentionOp, AttentionKernel> {
  const char* GetName() const { return "FusedAttention"; }
  size_t GetInputTypeCount() const { return 8; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    return i == 5 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return i < 6 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  size_t GetOutputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

}  // namespace
}  // namespace headpool

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) return base->GetApi(1)->CreateStatus(ORT_FAIL, "headpool's operators need a newer ONNX Runtime");
  Ort::InitApi(api);
  static const headpool::LinearOp linear;
  static const headpool::GatedOp gated;
  static const headpool::AttentionOp attention;
  static OrtCustomOpDomain* domain = nullptr;
  static std::mutex mutex;  // sessions may be opened in several threads
  const std::lock_guard lock(mutex);
  OrtStatus* status = nullptr;
  if (!domain) {
    status = api->CreateCustomOpDomain("headpool", &domain);
    for (const OrtCustomOp* op : {static_cast<const OrtCustomOp*>(&linear), static_cast<const OrtCustomOp*>(&gated),
                                  static_cast<const OrtCustomOp*>(&attention)})
      if (!status) status = api->CustomOpDomain_Add(domain, op);
  }
  return status ? status : api->AddCustomOpDomain(options, domain);
}
