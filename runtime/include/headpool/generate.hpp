// Choosing the next token, and whole texts as a stream of tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <headpool/session.hpp>
#include <memory>
#include <span>
#include <vector>

namespace headpool {

// How the next token is drawn. Temperature 0 is greedy: the most likely token, the first one among equals.
//
// Else logits are divided by the temperature, all but the top_k largest are dropped (0: none), then all but the smallest set
// whose probabilities sum to top_p or more (0 or 1: none; Holtzman et al. 2019, arXiv 1904.09751, section 3.1), and a token is
// drawn. Sequence b draws from a stream of its own, (seed, b), the same on every machine, so that what it gets does not depend
// on how many sequences there are.
struct Sampling {
  double temperature = 0;
  std::int64_t top_k = 0;
  double top_p = 1;
  std::uint64_t seed = 0;
};

// Used by one thread at a time. One that was moved from throws ArgumentError until it is assigned to.
class HEADPOOL_API Sampler {
 public:
  // Throws ArgumentError.
  explicit Sampler(const Sampling& sampling, std::int64_t batch = 1);
  Sampler(Sampler&&) noexcept;
  Sampler& operator=(Sampler&&) noexcept;
  ~Sampler();

  // The next token of each sequence, valid until the next call, from logits [B, V], of which −inf is never drawn. Throws
  // ArgumentError, also where one is NaN or +inf, or all of a sequence are −inf. Allocates in its first call only.
  std::span<const Token> pick(std::span<const float> logits);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct GenerateOptions {
  std::int64_t max_new_tokens = 128;
  Sampling sampling;
  std::vector<Token> stop_ids;  // for example the model's info().stop_ids
};

// Called with the B new tokens as soon as they are known, ENDED for a sequence that has met a stop token before; false ends the
// generation.
using OnTokens = std::function<bool(std::span<const Token>)>;

// Feeds the prompts after what is in the cache (to an encoder-decoder: its sources) and generates, a sequence until the stop
// token it drew (which is passed on), all until max_new_tokens. Returns how many times `on_tokens` was called.
//
// A sequence's last token, a stop token or not, is not fed: the next prompt begins with it where it is to be seen. What a
// sequence holds does not change after its end while others go on, so that every one's next turn is what it would be in a
// batch of its own.
//
// Throws as Session and Sampler do, ArgumentError where `on_tokens` is empty, and CapacityError before the first token where
// that many do not fit; BackendError where the model's logits are NaN or infinite; what on_tokens throws passes through.
HEADPOOL_API std::int64_t generate(Session& session, Prompts prompts, const GenerateOptions& options,
                                   const OnTokens& on_tokens);

}  // namespace headpool
