#include <algorithm>
#include <cmath>
#include <headpool/generate.hpp>
#include <limits>
#include <numeric>
#include <random>

#include "feeding.hpp"

namespace headpool {

struct Sampler::State {
  Token greedy(std::span<const float> logits) const;
  Token draw(std::span<const float> logits, std::mt19937_64& stream);
  void drop_all_but_top_k();
  void drop_all_but_top_p();

  struct Choice {
    double score;  // logit / temperature; then its share of the probability
    Token token;
  };

  Sampling sampling;
  std::vector<std::mt19937_64> streams;  // one a sequence
  std::vector<Token> tokens;
  std::vector<Choice> choices;  // by token, those not dropped
  std::vector<double> scores;
};

namespace {

std::mt19937_64 stream(std::uint64_t seed, std::uint64_t sequence) {
  std::seed_seq words{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
                      static_cast<std::uint32_t>(sequence), static_cast<std::uint32_t>(sequence >> 32)};
  return std::mt19937_64(words);
}

double uniform(std::mt19937_64& stream) { return static_cast<double>(stream() >> 11) * 0x1p-53; }  // [0, 1)

// −inf is a token that is not to be drawn.
void check(std::span<const float> logits) {
  float most = -std::numeric_limits<float>::infinity();
  bool nan = false;
  for (const float logit : logits) {
    nan |= std::isnan(logit);
    most = std::max(most, logit);
  }
  if (nan || !std::isfinite(most))
    throw ArgumentError("the logits are not finite numbers; the weights or the graph are broken");
}

}  // namespace

Sampler::Sampler(const Sampling& s, std::int64_t batch) : state_(std::make_unique<State>()) {
  if (!(std::isfinite(s.temperature) && s.temperature >= 0))
    throw ArgumentError("temperature " + std::to_string(s.temperature) + " is not a number from 0 (greedy) on");
  if (s.top_k < 0) throw ArgumentError("top-k " + std::to_string(s.top_k) + " is not a whole number from 0 (all tokens) on");
  if (!(s.top_p >= 0 && s.top_p <= 1)) throw ArgumentError("top-p " + std::to_string(s.top_p) + " is outside [0, 1]");
  if (batch < 1 || batch > detail::MOST_SEQUENCES)
    throw ArgumentError("batch " + std::to_string(batch) + " is not a whole number from 1 to " +
                        std::to_string(detail::MOST_SEQUENCES));
  state_->sampling = s;
  if (s.top_p == 0) state_->sampling.top_p = 1;
  state_->tokens.resize(static_cast<std::size_t>(batch));
  if (s.temperature > 0)
    for (std::int64_t b = 0; b < batch; ++b) state_->streams.push_back(stream(s.seed, static_cast<std::uint64_t>(b)));
}

Sampler::Sampler(Sampler&&) noexcept = default;
Sampler& Sampler::operator=(Sampler&&) noexcept = default;
Sampler::~Sampler() = default;

std::span<const Token> Sampler::pick(std::span<const float> logits) {
  if (!state_) throw ArgumentError("the sampler was moved from");
  const std::size_t batch = state_->tokens.size(), V = logits.size() / batch;
  if (!V || logits.size() % batch)
    throw ArgumentError(std::to_string(logits.size()) + " logits are not those of " + std::to_string(batch) + " sequences");
  for (std::size_t b = 0; b < batch; ++b) {
    const auto row = logits.subspan(b * V, V);
    check(row);
    state_->tokens[b] = state_->streams.empty() ? state_->greedy(row) : state_->draw(row, state_->streams[b]);
  }
  return state_->tokens;
}

Token Sampler::State::greedy(std::span<const float> logits) const {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

Token Sampler::State::draw(std::span<const float> logits, std::mt19937_64& stream) {
  choices.resize(logits.size());
  const double best = logits[static_cast<std::size_t>(greedy(logits))];  // less that, no score is too large a number
  for (std::size_t i = 0; i < logits.size(); ++i)
    choices[i] = {(logits[i] - best) / sampling.temperature, static_cast<Token>(i)};
  if (sampling.top_k > 0 && sampling.top_k < static_cast<std::int64_t>(choices.size())) drop_all_but_top_k();
  double most = choices.front().score;
  for (const Choice& choice : choices) most = std::max(most, choice.score);
  for (Choice& choice : choices) choice.score = std::exp(choice.score - most);
  if (sampling.top_p < 1) drop_all_but_top_p();
  double total = 0;
  for (const Choice& choice : choices) total += choice.score;
  double left = uniform(stream) * total;
  for (const Choice& choice : choices)
    if ((left -= choice.score) < 0) return choice.token;
  const auto positive = [](const Choice& choice) { return choice.score > 0; };
  return std::find_if(choices.rbegin(), choices.rend(), positive)->token;  // rounding: the last one that can be drawn
}

// Those that equal the last of them stay too.
void Sampler::State::drop_all_but_top_k() {
  scores.resize(choices.size());
  std::transform(choices.begin(), choices.end(), scores.begin(), [](const Choice& choice) { return choice.score; });
  const auto last = scores.begin() + (sampling.top_k - 1);
  std::nth_element(scores.begin(), last, scores.end(), std::greater<>());
  std::erase_if(choices, [least = *last](const Choice& choice) { return choice.score < least; });
}

// Scores are shares of the probability here, up to a factor. Only those that may belong to the set are sorted: all that have
// less than (1 − p) / n of the whole have together less than 1 − p.
void Sampler::State::drop_all_but_top_p() {
  const auto add = [](double sum, const Choice& choice) { return sum + choice.score; };
  const double total = std::accumulate(choices.begin(), choices.end(), 0.0, add);
  const double least = (1 - sampling.top_p) / static_cast<double>(choices.size()) * total;
  std::erase_if(choices, [least](const Choice& choice) { return choice.score < least; });
  const auto before = [](const Choice& a, const Choice& b) {
    return a.score != b.score ? a.score > b.score : a.token < b.token;
  };
  std::sort(choices.begin(), choices.end(), before);
  double sum = 0;
  std::size_t count = 0;
  while (count < choices.size() && sum < sampling.top_p * total) sum += choices[count++].score;
  choices.resize(std::max<std::size_t>(1, count));
  std::sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) { return a.token < b.token; });
}

namespace {

void check_room(const Session& session, Prompts prompts, std::int64_t count) {
  const auto batch = static_cast<std::size_t>(session.batch());
  for (std::size_t b = 0; b < std::min(batch, prompts.size()); ++b) {
    const std::int64_t held = session.lengths()[b], fed = static_cast<std::int64_t>(prompts[b].size());
    const auto need = static_cast<std::uint64_t>(held + fed) + static_cast<std::uint64_t>(count - 1);
    if (need > static_cast<std::uint64_t>(session.capacity()))
      throw CapacityError(detail::prompt_name(b, batch) + " of " + std::to_string(fed) + (fed == 1 ? " token" : " tokens") +
                          (held ? ", after " + std::to_string(held) + " in the cache," : "") + " and " + std::to_string(count) +
                          " new need " + std::to_string(need) + " cache rows, the capacity is " +
                          std::to_string(session.capacity()));
  }
}

// From the model's own logits, which are not the caller's to mend.
std::span<const Token> pick(Sampler& sampler, std::span<const float> logits) {
  try {
    return sampler.pick(logits);
  } catch (const ArgumentError& error) {
    throw BackendError(error.what());
  }
}

}  // namespace

std::int64_t generate(Session& session, Prompts prompts, const GenerateOptions& options, const OnTokens& on_tokens) {
  if (options.max_new_tokens < 1)
    throw ArgumentError("max_new_tokens " + std::to_string(options.max_new_tokens) + " is not a whole number from 1");
  if (!on_tokens) throw ArgumentError("generate was given an empty callback");
  Sampler sampler(options.sampling, std::max<std::int64_t>(1, session.batch()));
  check_room(session, prompts, options.max_new_tokens);
  std::vector<Token> next(static_cast<std::size_t>(session.batch()));
  std::span<const float> logits = session.prefill(prompts);
  for (std::int64_t count = 1;; ++count) {
    const std::span<const Token> tokens = pick(sampler, logits);
    for (std::size_t b = 0; b < next.size(); ++b)
      if (next[b] != ENDED) next[b] = tokens[b];
    if (!on_tokens(next) || count == options.max_new_tokens) return count;
    for (const Token stop : options.stop_ids) std::ranges::replace(next, stop, ENDED);
    if (std::ranges::count(next, ENDED) == session.batch()) return count;
    logits = session.decode(next);
  }
}

}  // namespace headpool
