// LinearChain: linear layers one after another, without leaving the threads between them. graphs/chain.py says what its
// inputs, outputs and attributes are.
#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <tuple>

#include "kernels.hpp"
#include "ort.hpp"
#include "products.hpp"
#include "relay.hpp"
#include "stages.hpp"

namespace headpool {
namespace {

constexpr size_t PIECE = 64 << 10;  // elements that a thread takes on where there are many rows
constexpr int64_t FORMAT = -2, HEAD = -3;

class ChainKernel : public Kernel<ChainKernel> {
 public:
  explicit ChainKernel(const OrtKernelInfo* raw) : plain_(raw, false), with_bias_(raw, true) {
    const Ort::ConstKernelInfo info(raw);
    inputs_ = info.GetInputCount();
    read_stages(raw, info);
    for (const int64_t value : info.GetAttributes<int64_t>("outputs")) {
      expect(value >= static_cast<int64_t>(inputs_) && value < static_cast<int64_t>(widths_.size()),
             "headpool::LinearChain: an output is none of the stages'");
      expect(std::find(outputs_.begin(), outputs_.end(), value) == outputs_.end(),
             "headpool::LinearChain: an output is given twice");
      outputs_.push_back(value);
    }
    expect(outputs_.size() == info.GetOutputCount(), "headpool::LinearChain: `outputs` has a wrong length");
    for (const Stage& stage : stages_) ends_.push_back((ends_.empty() ? 0 : ends_.back()) + stage.ends.back());
  }

  void compute(OrtKernelContext* raw) {
    const Ort::KernelContext context(raw);
    thread_local std::vector<float*> values;  // kept from step to step
    values.assign(widths_.size(), nullptr);
    const Shape first(context.GetInput(stages_.front().x));
    expect(first.rank() == 2, "headpool::LinearChain: x must have two dimensions");
    if (tokens_ != NONE) return head(context, raw, values, first);
    const size_t M = first[0];
    for (size_t i = 0; i < inputs_; ++i) {
      if (!widths_[i]) continue;
      const auto value = context.GetInput(i);
      const Shape found(value);
      expect(found.type() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "headpool::LinearChain: an input is not of floats");
      expect(found.is({first[0], static_cast<int64_t>(widths_[i])}),
             "headpool::LinearChain: an input does not fit the weights");
      values[i] = const_cast<float*>(floats(value));
    }
    for (size_t i = 0; i < outputs_.size(); ++i) values[outputs_[i]] = output(context, i, M).GetTensorMutableData<float>();
    run(context, raw, values, M);
  }

 private:
  void run(const Ort::KernelContext& context, OrtKernelContext* raw, std::vector<float*>& values, size_t M) {
    if (!M) return;
    M > FEW_ROWS ? many_rows(context, raw, values, M) : few_rows(context, values, M);
  }

  void head(const Ort::KernelContext& context, OrtKernelContext* raw, std::vector<float*>& values, const Shape& found) {
    const Stage& stage = stages_.front();
    const auto x = context.GetInput(stage.x);
    const Shape tokens(context.GetInput(tokens_));
    expect(found.type() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && found[1] == static_cast<int64_t>(stage.K),
           "headpool::LinearChain: an input does not fit the weights");
    expect(tokens.rank() == 2 && tokens[0] * tokens[1] == found[0] && (!last_ || tokens[1] > 0 || !tokens[0]),
           "headpool::LinearChain: x does not fit the tokens");
    const size_t B = tokens[0], T = tokens[1], N = stage.layers.front().N;
    const int64_t sizes[] = {tokens[0], last_ ? 1 : tokens[1], static_cast<int64_t>(N)};
    values[outputs_.front()] = context.GetOutput(0, sizes, 3).GetTensorMutableData<float>();
    values[stage.x] = const_cast<float*>(floats(x));
    if (last_ && T > 1) {
      thread_local std::vector<float> memory;
      float* const rows = buffer(memory, B * stage.K);
      for (size_t b = 0; b < B; ++b) std::copy_n(values[stage.x] + ((b + 1) * T - 1) * stage.K, stage.K, rows + b * stage.K);
      values[stage.x] = rows;
    }
    run(context, raw, values, last_ ? B : B * T);
  }

  // The same at every call of a step.
  Ort::UnownedValue output(const Ort::KernelContext& context, size_t i, size_t M) const {
    const int64_t sizes[] = {static_cast<int64_t>(M), static_cast<int64_t>(widths_[outputs_[i]])};
    return context.GetOutput(i, sizes, 2);
  }

  void read_stages(const OrtKernelInfo* raw, const Ort::ConstKernelInfo& info) {
    const auto numbers = info.GetAttributes<int64_t>("stages");
    const auto epsilons = info.GetAttributes<float>("epsilons"), offsets = info.GetAttributes<float>("offsets");
    widths_.assign(inputs_, 0);
    expect(!numbers.empty() && (numbers[0] == FORMAT || numbers[0] == HEAD),
           "headpool::LinearChain: the graph was exported by another version of headpool; export it again");
    size_t at = 1;
    const auto next = [&](int64_t least, size_t end) {
      expect(at < numbers.size() && numbers[at] >= least && numbers[at] < static_cast<int64_t>(end),
             "headpool::LinearChain: `stages` is cut short or holds a number out of range");
      return numbers[at++];
    };
    if (numbers[0] == HEAD) {
      tokens_ = next(0, inputs_);
      last_ = next(0, 2) == 1;
    }
    while (at < numbers.size()) {
      Stage stage{};
      const size_t known = widths_.size();
      stage.x = next(0, known);
      stage.residual = next(NONE, known);
      const int64_t norm_index = next(NONE, inputs_);
      stage.activation = next(NONE, ACTIVATIONS);
      stage.bits = next(0, 9);
      expect(stage.bits == 0 || stage.bits == 4 || stage.bits == 8, "headpool::LinearChain: `bits` is none of 0, 4, 8");
      const size_t count = next(1, inputs_ + 1);
      const auto [norm, norm_shape] = constant(info, norm_index);
      for (size_t i = 0; i < count; ++i) {
        const auto w = next(0, inputs_), s = next(NONE, inputs_), b = next(NONE, inputs_);
        const auto [biases, b_shape] = constant(info, b);
        const auto [matrix, N, K] = read_matrix(info, w, s, stage.bits);
        expect(K > 0 && (!biases || b_shape.is({N})) && (!i || K == static_cast<int64_t>(stage.K)),
               "headpool::LinearChain: the weights of a stage contradict each other");
        stage.K = K;
        Layer layer{static_cast<size_t>(w), s, b, matrix, biases, static_cast<size_t>(N), 0, {}};
        if (stage.bits) layer.product = std::make_shared<QuantisedProduct>(raw, N, K, stage.bits);
        stage.layers.push_back(std::move(layer));
      }
      expect(!norm || norm_shape.is({static_cast<int64_t>(stage.K)}),
             "headpool::LinearChain: the weight of a norm does not fit x");
      expect(stage.activation == NONE || (stage.residual == NONE && (stage.activated() || stage.gated())),
             "headpool::LinearChain: an activation is of one layer or of two, and has no residual");
      expect(stage.gated() ? stage.layers[0].N == stage.layers[1].N : stage.residual == NONE || count == 1,
             "headpool::LinearChain: a gate has two layers of one shape, a residual one layer");
      has_width(stage.x, stage.K);
      if (stage.residual != NONE) has_width(stage.residual, stage.layers[0].N);
      expect(stages_.size() < std::min(epsilons.size(), offsets.size()),
             "headpool::LinearChain: `epsilons` or `offsets` is too short");
      stage.norm = {norm, stage.K, epsilons[stages_.size()], offsets[stages_.size()]};
      for (Layer& layer : stage.layers) {
        if (!stage.gated() || &layer == &stage.layers[0]) widths_.push_back(layer.N);
        layer.y = widths_.size() - 1;
        if (stage.gated() && &layer != &stage.layers[0]) continue;
        stage.ends.push_back((stage.ends.empty() ? 0 : stage.ends.back()) + divide_up(layer.N, stage.rows_per_unit()));
      }
      stages_.push_back(std::move(stage));
    }
    expect(!stages_.empty() && stages_.front().x < inputs_, "headpool::LinearChain: `stages` is empty");
    expect(tokens_ == NONE ||
               (stages_.size() == 1 && widths_.size() == inputs_ + 1 && stages_.front().residual == NONE && !widths_[tokens_]),
           "headpool::LinearChain: a head is one stage with one output");
  }

  // The graph's own weights, so that they can be looked up once.
  static Ort::ConstValue weight(const Ort::ConstKernelInfo& info, int64_t index, ONNXTensorElementDataType type) {
    int is_constant = 0;
    const Ort::ConstValue value = info.GetTensorConstantInput(index, &is_constant);
    expect(is_constant, "headpool::LinearChain: a weight is not constant");
    expect(Shape(value).type() == type, "headpool::LinearChain: a weight has another type");
    return value;
  }

  // The data and shape of a weight of floats; null for NONE.
  static std::pair<const float*, Shape> constant(const Ort::ConstKernelInfo& info, int64_t index) {
    if (index == NONE) return {};
    const Ort::ConstValue value = weight(info, index, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    return {floats(value), Shape(value)};
  }

  // The weights of a layer, and N and K.
  static std::tuple<Matrix, int64_t, int64_t> read_matrix(const Ort::ConstKernelInfo& info, int64_t w, int64_t s, size_t bits) {
    expect(!bits == (s == NONE), "headpool::LinearChain: scales are of quantised weights");
    const auto [scales, s_shape] = constant(info, s);
    if (!bits) {
      const auto [data, found] = constant(info, w);
      expect(found.rank() == 2, "headpool::LinearChain: the weights of a layer are no matrix");
      return {{data, nullptr, 0}, found[0], found[1]};
    }
    const Ort::ConstValue q = weight(info, w, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
    const Shape found(q);
    expect(found.rank() == 3 && found[2] == static_cast<int64_t>(row_bytes(BLOCK, bits)) && s_shape.is({found[0], found[1]}),
           "headpool::LinearChain: quantised weights contradict their scales");
    return {{q.GetTensorData<uint8_t>(), scales, bits}, found[0], found[1] * static_cast<int64_t>(BLOCK)};
  }

  // Rows of x or of a residual, whose width the weights say.
  void has_width(size_t value, size_t width) {
    if (value < inputs_ && !widths_[value]) widths_[value] = width;
    expect(widths_[value] == width, "headpool::LinearChain: what one stage gives does not fit the next");
  }

  void few_rows(const Ort::KernelContext& context, std::vector<float*>& values, size_t M) {
    thread_local std::vector<float> memory;  // of what only the stages see
    size_t total = 0;
    for (size_t i = inputs_; i < values.size(); ++i) total += values[i] ? 0 : widths_[i] * M;
    float* free = buffer(memory, total);
    for (size_t i = inputs_; i < values.size(); ++i)
      if (!values[i]) values[i] = free, free += widths_[i] * M;
    Step step{stages_, values, M};
    Relay<Step> relay(ends_, threads_, step);
    static const size_t most = std::max(1u, std::thread::hardware_concurrency());
    parallel(context, std::min(most, ends_.back()), [&](size_t) { relay.work(); });
    if (relay.workers() > threads_) threads_ = relay.workers();
  }

  void many_rows(const Ort::KernelContext& context, OrtKernelContext* raw, const std::vector<float*>& given, size_t M) {
    std::vector<const OrtValue*> values(widths_.size());
    std::vector<Ort::Value> own;
    Ort::AllocatorWithDefaultOptions allocator;
    const auto host = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    for (size_t i = 0; i < values.size(); ++i) {
      const int64_t dimensions[] = {static_cast<int64_t>(M), static_cast<int64_t>(widths_[i])};
      if (given[i])
        own.push_back(Ort::Value::CreateTensor<float>(host, given[i], M * widths_[i], dimensions, 2)), values[i] = own.back();
      else if (i < inputs_)
        values[i] = context.GetInput(i);
    }
    const auto create = [&](size_t width) {
      const int64_t dimensions[] = {static_cast<int64_t>(M), static_cast<int64_t>(width)};
      own.push_back(Ort::Value::CreateTensor<float>(allocator, dimensions, 2));
      return static_cast<OrtValue*>(own.back());
    };
    const auto data = [](const OrtValue* value) {
      return Ort::UnownedValue(const_cast<OrtValue*>(value)).GetTensorMutableData<float>();
    };
    const auto each = [&](size_t total, size_t step, const auto& work) {
      parallel(context, divide_up(total, step), [&](size_t task) { work(task * step, std::min(total, (task + 1) * step)); });
    };
    for (const Stage& stage : stages_) {
      const OrtValue* x = values[stage.x];
      if (stage.norm.weight) {
        const float* from = data(x);
        OrtValue* normed = create(stage.K);
        float* to = data(normed);
        each(M, std::max<size_t>(1, PIECE / stage.K), [&](size_t m, size_t end) {
          for (; m < end; ++m) kernels().normalise(stage.norm, from + m * stage.K, to + m * stage.K);
        });
        x = normed;
      }
      const OrtValue* gate = nullptr;
      for (const Layer& layer : stage.layers) {
        const OrtValue* bias = layer.bias == NONE ? nullptr : values[layer.bias];
        const bool is_gate = stage.gated() && !gate;
        if (!is_gate && !values[layer.y]) values[layer.y] = create(layer.N);
        OrtValue* y = is_gate ? create(layer.N) : const_cast<OrtValue*>(values[layer.y]);
        if (layer.product) {
          (*layer.product)(raw, x, values[layer.w], values[layer.scales], y);
          float* to = data(y);
          for (size_t m = 0; layer.biases && m < M; ++m)
            for (size_t n = 0; n < layer.N; ++n) to[m * layer.N + n] += layer.biases[n];
        } else {
          (bias ? with_bias_ : plain_)(raw, x, values[layer.w], bias, y);
        }
        if (is_gate) gate = y;
      }
      const Layer& last = stage.layers.back();
      float* y = data(values[last.y]);
      if (gate) {
        const float* from = data(gate);
        each(M * last.N, PIECE / 4, [&](size_t i, size_t end) {
          kernels().activate(from + i, y + i, end - i, static_cast<Activation>(stage.activation));
        });
      }
      if (stage.activated())
        each(M * last.N, PIECE / 4, [&](size_t i, size_t end) { activate(y + i, end - i, stage.activation); });
      if (stage.residual != NONE) {
        const float* residual = data(values[stage.residual]);
        each(M * last.N, PIECE, [&](size_t i, size_t end) {
          for (; i < end; ++i) y[i] += residual[i];
        });
      }
    }
  }

  size_t inputs_;
  int64_t tokens_ = NONE;        // of a head: the input that has the shape [B,T]
  bool last_ = false;            // and whether it is of each sequence's last token
  std::vector<size_t> widths_;   // of the values; 0 for weights
  std::vector<size_t> outputs_;  // values
  std::vector<Stage> stages_;
  std::vector<size_t> ends_;
  Gemm plain_, with_bias_;
  std::atomic<size_t> threads_{2};  // of the session, which does not tell: as many as were ever seen at work
};

struct ChainOp : Operator<ChainOp, ChainKernel> {
  const char* GetName() const { return "LinearChain"; }
  size_t GetInputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  bool GetVariadicInputHomogeneity() const { return false; }  // bytes of quantised weights are among them
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
};

}  // namespace

const OrtCustomOp* chain_operator() {
  static const ChainOp op;
  return &op;
}

}  // namespace headpool
