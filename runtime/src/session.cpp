#include <algorithm>
#include <headpool/session.hpp>

#include "guard.hpp"
#include "state.hpp"

namespace headpool {

using detail::Feed;

struct Session::State {
  State(Model m, const SessionOptions& options);

  void prefill(Prompts prompts);
  void decode(std::span<const Token> tokens);

  void check_tokens(std::span<const Token> tokens, std::string_view name) const;
  void check_prompts(Prompts prompts) const;
  void check_sources(std::int64_t length) const;
  void check_in_step() const;
  void feed(const Feed& feed);
  void rewind(std::int64_t length);
  std::span<const float> logits_of(std::int64_t sequence) const;
  bool pair() const { return model.info().encoder_layers > 0; }
  std::int64_t longest() const { return *std::max_element(lengths.begin(), lengths.end()); }

  Model model;
  std::int64_t batch, capacity;
  std::vector<std::int64_t> lengths;
  std::vector<std::int64_t> answered;  // of each sequence, whether the last call gave it logits
  Feed step;                           // T = 1
  std::unique_ptr<detail::Runner> runner;
};

namespace {

std::int64_t positive(const char* name, std::int64_t value, std::int64_t most) {
  if (value < 1 || value > most)
    throw ArgumentError(std::string(name) + " " + std::to_string(value) + " is not a whole number from 1 to " +
                        std::to_string(most));
  return value;
}

}  // namespace

Session::State::State(Model m, const SessionOptions& options)
    : model(std::move(m)), batch(positive("batch", options.batch, detail::MOST_SEQUENCES)) {
  const std::int64_t chunk = positive("chunk", options.chunk, INT32_MAX);
  const Model::State& loaded = *model.state_;
  capacity = options.capacity ? std::min(positive("capacity", options.capacity, INT64_MAX), loaded.variant.info.max_positions)
                              : loaded.most_tokens(batch);
  detail::guarded("no session", [&] {
    lengths.resize(static_cast<std::size_t>(batch));
    answered = lengths;
    step = {1, lengths, lengths, lengths};
    runner = loaded.runner({batch, capacity, chunk, options.capacity > 0});
  });
}

// `name` says where they stand.
void Session::State::check_tokens(std::span<const Token> tokens, std::string_view name) const {
  const std::int64_t vocab = model.info().vocab_size;
  for (std::size_t i = 0; i < tokens.size(); ++i)  // a gather would read past the embedding
    if (tokens[i] < 0 || tokens[i] >= vocab)
      throw ArgumentError("token id " + std::to_string(tokens[i]) + ", " + std::string(name) + "[" + std::to_string(i) +
                          "], is outside the vocabulary of " + std::to_string(vocab));
}

void Session::State::check_prompts(Prompts prompts) const {
  if (static_cast<std::int64_t>(prompts.size()) != batch)
    throw ArgumentError(std::to_string(prompts.size()) + " prompts for a session of batch " + std::to_string(batch));
  if (pair() && longest())
    throw ArgumentError("an encoder-decoder reads its source at once; reset the session before the next one");
  for (std::size_t b = 0; b < prompts.size(); ++b) {
    const std::string what = pair() ? "source" : "prompt", name = detail::prompt_name(b, prompts.size(), what);
    if (prompts[b].empty()) throw ArgumentError(name + " has no tokens");
    if (pair() && static_cast<std::int64_t>(prompts[b].size()) > capacity)
      throw CapacityError(name + " of the encoder has " + std::to_string(prompts[b].size()) + " tokens, the capacity is " +
                          std::to_string(capacity));
    if (static_cast<std::int64_t>(prompts[b].size()) > capacity - lengths[b])
      throw CapacityError(name + " needs " + (lengths[b] ? std::to_string(lengths[b]) + " + " : "") +
                          std::to_string(prompts[b].size()) + " cache rows, the capacity is " + std::to_string(capacity));
    check_tokens(prompts[b], prompts.size() > 1 ? name : what);  // last: what is too long is not read
  }
}

void Session::State::check_sources(std::int64_t length) const {
  const std::span<const std::int64_t> sources = runner->sources();
  if (sources.empty()) return;
  const auto [least, most] = std::ranges::minmax(sources);
  if (least != most || length < most)
    throw ArgumentError("cannot rewind to " + std::to_string(length) + " tokens: the sources, of " + std::to_string(least) +
                        " to " + std::to_string(most) + " tokens, stay whole, and all sequences in step");
}

// Nothing hides a pad in an encoder-decoder's concat cache, so a sequence that got one cannot go on.
void Session::State::check_in_step() const {
  if (!pair() || model.state_->variant.in_place) return;
  const std::span<const std::int64_t> sources = runner->sources();
  std::int64_t most = 0;
  for (std::size_t b = 0; b < lengths.size(); ++b) most = std::max(most, lengths[b] - sources[b]);
  for (std::size_t b = 0; b < lengths.size(); ++b)
    if (step.counts[b] && lengths[b] - sources[b] < most)
      throw ArgumentError("a sequence that ended early cannot go on in an encoder-decoder's concat cache; reset the session");
}

void Session::State::prefill(Prompts prompts) {
  check_prompts(prompts);
  detail::guarded("the prefill failed", [&] {
    for (const Feed& part : runner->plan(prompts, lengths)) feed(part);
  });
  std::ranges::fill(answered, 1);
}

void Session::State::decode(std::span<const Token> tokens) {
  if (static_cast<std::int64_t>(tokens.size()) != batch)
    throw ArgumentError("decode takes " + std::to_string(batch) + " tokens, one a sequence, got " +
                        std::to_string(tokens.size()));
  std::ranges::replace_copy(tokens, step.tokens.begin(), ENDED, detail::PAD);
  std::ranges::transform(tokens, step.counts.begin(), [](Token token) { return token != ENDED; });
  check_tokens(step.tokens, "tokens");
  if (std::ranges::count(tokens, ENDED) == batch) throw ArgumentError("decode was given no token: all sequences have ended");
  if (pair() && !longest()) throw ArgumentError("an encoder-decoder decodes after a source; give it one with prefill");
  check_in_step();
  if (longest() >= capacity) throw CapacityError("the cache is full: " + std::to_string(capacity) + " tokens a sequence");
  std::copy(lengths.begin(), lengths.end(), step.positions.begin());
  detail::guarded("the step failed", [&] { feed(step); });
  std::ranges::copy(step.counts, answered.begin());
}

void Session::State::feed(const Feed& part) {
  std::ranges::fill(answered, 0);
  runner->run(part, lengths);
  for (std::size_t b = 0; b < lengths.size(); ++b) lengths[b] += part.counts[b];
}

std::span<const float> Session::State::logits_of(std::int64_t sequence) const {
  const std::string name = "sequence " + std::to_string(sequence);
  if (sequence < 0 || sequence >= batch) throw ArgumentError(name + " is not one of 0 to " + std::to_string(batch - 1));
  if (!answered[static_cast<std::size_t>(sequence)])
    throw ArgumentError(name + " has no logits: the session's last call gave it none");
  const auto V = static_cast<std::size_t>(model.info().vocab_size);
  return runner->logits().subspan(static_cast<std::size_t>(sequence) * V, V);
}

void Session::State::rewind(std::int64_t length) {
  const std::int64_t shortest = *std::min_element(lengths.begin(), lengths.end());
  if (length < 0 || length > shortest)
    throw ArgumentError("cannot rewind to " + std::to_string(length) + " tokens: the shortest sequence holds " +
                        std::to_string(shortest));
  if (length) check_sources(length);
  runner->rewind(length);
  std::ranges::fill(lengths, length);
  std::ranges::fill(answered, 0);
}

Session::Session(Model model, const SessionOptions& options) : state_(std::make_unique<State>(std::move(model), options)) {}
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

Session::State& Session::state() const {
  if (!state_) throw ArgumentError("the session was moved from");
  return *state_;
}

std::span<const float> Session::prefill(Prompts prompts) {
  state().prefill(prompts);
  return state_->runner->logits();
}
std::span<const float> Session::prefill(std::span<const Token> prompt) { return prefill({&prompt, 1}); }

std::span<const float> Session::decode(std::span<const Token> tokens) {
  state().decode(tokens);
  return state_->runner->logits();
}
std::span<const float> Session::decode(Token token) { return decode({&token, 1}); }

std::span<const float> Session::logits(std::int64_t sequence) const { return state().logits_of(sequence); }

void Session::rewind(std::int64_t length) { state().rewind(length); }
void Session::reset() { rewind(0); }

const Model& Session::model() const noexcept { return state_->model; }
std::int64_t Session::batch() const noexcept { return state_ ? state_->batch : 0; }
std::int64_t Session::capacity() const noexcept { return state_ ? state_->capacity : 0; }
std::span<const std::int64_t> Session::lengths() const noexcept {
  return state_ ? std::span<const std::int64_t>(state_->lengths) : std::span<const std::int64_t>();
}

std::uint64_t Session::kv_bytes() const noexcept {
  std::uint64_t tokens = 0;
  for (const std::int64_t length : lengths())  // an encoder-decoder's start token is in the cache too
    tokens += static_cast<std::uint64_t>(length + (length && state_->pair()));
  return tokens ? tokens * state_->model.info().kv_bytes_per_token : 0;
}

}  // namespace headpool
