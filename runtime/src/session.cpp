#include <algorithm>
#include <headpool/session.hpp>
#include <optional>

#include "cache.hpp"

namespace headpool {

using detail::Call;
using detail::Feed;

struct Session::State {
  State(Model m, const SessionOptions& options);

  std::span<const float> prefill(Prompts prompts);
  std::span<const float> decode(std::span<const Token> tokens);

  void check_tokens(std::span<const Token> tokens) const;
  void check_prompts(Prompts prompts) const;
  void feed(const Feed& feed);
  void run(Call& call, std::span<const std::int64_t> counts);
  void read_logits(std::span<const std::byte> raw, std::int64_t T);
  std::span<const float> scores() const { return {floats(), logits.size() / sizeof(float)}; }

  std::int64_t longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
  const Model::State& loaded() const { return *model.state_; }
  std::size_t raw_bytes(std::int64_t b, std::int64_t T) const {
    const detail::Variant& v = loaded().variant;
    return static_cast<std::size_t>(b * (v.all_logits ? T : 1) * v.info.vocab_size) * v.item_bytes();
  }
  std::byte* raw() const { return half.size() ? half.data() : logits.data(); }
  float* floats() const { return reinterpret_cast<float*>(logits.data()); }

  Model model;
  std::int64_t batch, capacity, chunk;
  std::vector<std::int64_t> lengths;
  detail::Memory logits;  // float [B, V]
  detail::Memory half;    // the same as a graph in half precision writes it
  std::unique_ptr<detail::Cache> cache;
  std::optional<Call> step;  // T = 1, bound once
};

namespace {

constexpr std::int64_t MOST_SEQUENCES = 65536;

std::int64_t positive(const char* name, std::int64_t value, std::int64_t most) {
  if (value < 1 || value > most)
    throw ArgumentError(std::string(name) + " " + std::to_string(value) + " is not a whole number from 1 to " +
                        std::to_string(most));
  return value;
}

std::int64_t capacity_of(const ModelInfo& info, std::int64_t asked) {
  return asked ? std::min(positive("capacity", asked, INT64_MAX), info.max_positions) : info.max_positions;
}

}  // namespace

Session::State::State(Model m, const SessionOptions& options)
    : model(std::move(m)),
      batch(positive("batch", options.batch, MOST_SEQUENCES)),
      capacity(capacity_of(model.info(), options.capacity)),
      chunk(positive("chunk", options.chunk, INT32_MAX)) {
  const detail::Variant& v = loaded().variant;
  detail::guarded("no session", [&] {
    lengths.resize(static_cast<std::size_t>(batch));
    logits = detail::Memory(lengths.size() * static_cast<std::size_t>(v.info.vocab_size) * sizeof(float));
    if (v.dtype != detail::DataType::fp32) half = detail::Memory(raw_bytes(batch, 1));
    cache = (v.in_place ? detail::static_cache : detail::concat_cache)(loaded(), batch, capacity, chunk);
    step.emplace(loaded(), batch, 1, raw(), raw_bytes(batch, 1));
  });
}

void Session::State::check_tokens(std::span<const Token> tokens) const {
  const std::int64_t vocab = model.info().vocab_size;
  for (const Token token : tokens)  // a gather would read past the embedding
    if (token < 0 || token >= vocab)
      throw ArgumentError("token id " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(vocab));
}

void Session::State::check_prompts(Prompts prompts) const {
  if (static_cast<std::int64_t>(prompts.size()) != batch)
    throw ArgumentError(std::to_string(prompts.size()) + " prompts for a session of batch " + std::to_string(batch));
  for (std::size_t b = 0; b < prompts.size(); ++b) {
    if (prompts[b].empty()) throw ArgumentError("prompt " + std::to_string(b) + " has no tokens");
    check_tokens(prompts[b]);
    if (static_cast<std::int64_t>(prompts[b].size()) > capacity - lengths[b])
      throw CapacityError("prompt " + std::to_string(b) + " needs " + std::to_string(lengths[b]) + " + " +
                          std::to_string(prompts[b].size()) + " cache rows, the capacity is " + std::to_string(capacity));
  }
}

std::span<const float> Session::State::prefill(Prompts prompts) {
  check_prompts(prompts);
  detail::guarded("ONNX Runtime failed in a prefill", [&] {
    for (const Feed& part : cache->plan(prompts, lengths)) feed(part);
  });
  return scores();
}

std::span<const float> Session::State::decode(std::span<const Token> tokens) {
  if (static_cast<std::int64_t>(tokens.size()) != batch)
    throw ArgumentError("decode takes " + std::to_string(batch) + " tokens, one a sequence, got " +
                        std::to_string(tokens.size()));
  check_tokens(tokens);
  if (longest() >= capacity) throw CapacityError("the cache is full: " + std::to_string(capacity) + " tokens a sequence");
  std::copy(tokens.begin(), tokens.end(), step->tokens().begin());
  std::copy(lengths.begin(), lengths.end(), step->positions().begin());
  detail::guarded("ONNX Runtime failed in a step", [&] { run(*step, {}); });
  for (std::int64_t& length : lengths) ++length;
  read_logits({raw(), raw_bytes(batch, 1)}, 1);
  return scores();
}

void Session::State::feed(const Feed& part) {
  std::vector<std::byte> all;  // logits of every position, which only the last of is wanted
  std::optional<Call> own;
  std::span<std::byte> target{raw(), raw_bytes(batch, 1)};
  if (part.T > 1) {
    if (loaded().variant.all_logits) {
      all.resize(raw_bytes(batch, part.T));
      target = all;
    }
    own.emplace(loaded(), batch, part.T, target.data(), target.size());
  }
  Call& call = own ? *own : *step;
  std::copy(part.tokens.begin(), part.tokens.end(), call.tokens().begin());
  std::copy(part.positions.begin(), part.positions.end(), call.positions().begin());
  // com.microsoft.GroupQueryAttention takes several tokens of several sequences only while the cache is empty.
  const bool by_rows = loaded().variant.info.pattern == "gqa" && batch > 1 && part.T > 1 && longest() > 0;
  if (by_rows) {
    cache->prepare(call, lengths, part.counts);
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::size_t bytes = raw_bytes(1, part.T);
      const auto place = static_cast<std::size_t>(b);
      Call row(loaded(), 1, part.T, target.data() + place * bytes, bytes);
      std::copy_n(part.tokens.begin() + b * part.T, part.T, row.tokens().begin());
      std::copy_n(part.positions.begin() + b * part.T, part.T, row.positions().begin());
      cache->bind(row, b);
      row.run();
    }
    cache->commit(call);
  } else {
    run(call, part.counts);
  }
  for (std::size_t b = 0; b < lengths.size(); ++b) lengths[b] += part.counts[b];
  read_logits(target, part.T);
}

void Session::State::run(Call& call, std::span<const std::int64_t> counts) {
  cache->prepare(call, lengths, counts);
  cache->bind(call, 0);
  call.run();
  cache->commit(call);
}

// Brings the newest logits to `logits`, where the graph did not write them there itself.
void Session::State::read_logits(std::span<const std::byte> written, std::int64_t T) {
  const detail::Variant& v = loaded().variant;
  const std::int64_t rows = v.all_logits ? T : 1;
  if (rows == 1 && v.dtype == detail::DataType::fp32) return;
  const auto V = static_cast<std::size_t>(v.info.vocab_size), stride = V * static_cast<std::size_t>(rows);
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    const std::byte* from = written.data() + (b * stride + stride - V) * v.item_bytes();
    float* to = floats() + b * V;
    if (v.dtype == detail::DataType::fp32)
      std::copy_n(reinterpret_cast<const float*>(from), V, to);
    else if (v.dtype == detail::DataType::fp16)
      std::transform(reinterpret_cast<const Ort::Float16_t*>(from), reinterpret_cast<const Ort::Float16_t*>(from) + V, to,
                     [](Ort::Float16_t value) { return value.ToFloat(); });
    else
      std::transform(reinterpret_cast<const Ort::BFloat16_t*>(from), reinterpret_cast<const Ort::BFloat16_t*>(from) + V, to,
                     [](Ort::BFloat16_t value) { return value.ToFloat(); });
  }
}

Session::Session(Model model, const SessionOptions& options) : state_(std::make_unique<State>(std::move(model), options)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

std::span<const float> Session::prefill(Prompts prompts) { return state_->prefill(prompts); }
std::span<const float> Session::prefill(std::span<const Token> prompt) { return state_->prefill({&prompt, 1}); }
std::span<const float> Session::decode(std::span<const Token> tokens) { return state_->decode(tokens); }
std::span<const float> Session::decode(Token token) { return state_->decode({&token, 1}); }

std::span<const float> Session::logits(std::int64_t sequence) const {
  if (sequence < 0 || sequence >= state_->batch)
    throw ArgumentError("sequence " + std::to_string(sequence) + " of a batch of " + std::to_string(state_->batch));
  const auto V = static_cast<std::size_t>(state_->model.info().vocab_size);
  return state_->scores().subspan(static_cast<std::size_t>(sequence) * V, V);
}

void Session::rewind(std::int64_t length) {
  const std::int64_t shortest = *std::min_element(state_->lengths.begin(), state_->lengths.end());
  if (length < 0 || length > shortest)
    throw ArgumentError("cannot rewind to " + std::to_string(length) + " tokens: the shortest sequence holds " +
                        std::to_string(shortest));
  state_->cache->rewind(length);
  std::fill(state_->lengths.begin(), state_->lengths.end(), length);
}

void Session::reset() { rewind(0); }

const Model& Session::model() const noexcept { return state_->model; }
std::int64_t Session::batch() const noexcept { return state_->batch; }
std::int64_t Session::capacity() const noexcept { return state_->capacity; }
std::span<const std::int64_t> Session::lengths() const noexcept { return state_->lengths; }

std::uint64_t Session::kv_bytes() const noexcept {
  std::uint64_t tokens = 0;
  for (const std::int64_t length : state_->lengths) tokens += static_cast<std::uint64_t>(length);
  return tokens * state_->model.info().kv_bytes_per_token;
}

}  // namespace headpool
