// Generates tokens from a bundle, printing each as it is known:
//
//     generate bundle g4.fused 20 1 504 3575 282        20 new tokens after the ids 1 504 3575 282; "" is the first variant
//     generate bundle g4.fused 20 The capital of        the same in text, where it was built with tokenizers-cpp
//     generate t5-bundle "" 20 1 504 3575 282           what an encoder-decoder says to this source
//     generate --backend tensorrt-rtx bundle …          on the engines that headpool build made
//
// https://github.com/mlc-ai/tokenizers-cpp reads the tokenizer.json in a bundle: cmake -DTOKENIZERS_CPP=/path/to/its/checkout
//
// Words of a text are joined by one space each, and begin and end as the tokenizer.json says (a token that begins every text is
// added; a chat template is not applied, and a token that ends every text, as T5's, is added too). Special tokens are not
// shown.
#include <headpool/generate.hpp>

#include "arguments.hpp"

#ifdef HEADPOOL_TOKENIZERS_CPP
#include <tokenizers_c.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <memory>
#endif

namespace {

constexpr const char* USAGE = "generate [--backend NAME] BUNDLE VARIANT NEW-TOKENS PROMPT…";

#ifdef HEADPOOL_TOKENIZERS_CPP
// The tokenizer.json of a bundle, through the C interface of tokenizers-cpp: its C++ one knows of no special tokens.
class Tokenizer {
 public:
  explicit Tokenizer(const std::string& bundle) {
    std::ifstream file(bundle + "/tokenizer.json", std::ios::binary);
    const std::string json{std::istreambuf_iterator<char>(file), {}};
    if (json.empty())
      throw headpool::BundleError(bundle + " has no tokenizer.json; pass token ids to a build without tokenizers-cpp");
    handle_.reset(tokenizers_new_from_str(json.data(), json.size()));
  }

  // With the special tokens that a text begins and ends with.
  std::vector<headpool::Token> encode(const std::string& text) {
    TokenizerEncodeResult found{};
    tokenizers_encode(handle_.get(), text.data(), text.size(), /*add_special_token=*/1, &found);
    const std::vector<headpool::Token> ids(found.token_ids, found.token_ids + found.len);
    tokenizers_free_encode_results(&found, 1);
    return ids;
  }

  // Without special tokens.
  std::string decode(const std::vector<std::uint32_t>& ids) {
    tokenizers_decode(handle_.get(), ids.data(), ids.size(), /*skip_special_token=*/1);
    const char* text = nullptr;
    std::size_t size = 0;
    tokenizers_get_decode_str(handle_.get(), &text, &size);
    return {text, size};
  }

 private:
  struct Free {
    void operator()(void* handle) const { tokenizers_free(handle); }
  };
  std::unique_ptr<void, Free> handle_;
};
#endif

void run(const std::string& bundle, const headpool::ModelOptions& how, std::int64_t count, const Words& words) {
  // 1. The prompt as token ids, and what prints new ones.
  std::vector<headpool::Token> prompt, stops;
  std::function<void(headpool::Token)> print = [](headpool::Token token) {
    std::printf("%lld\n", static_cast<long long>(token));
  };
#ifdef HEADPOOL_TOKENIZERS_CPP
  Tokenizer tokenizer(bundle);
  std::string text = words[0];
  for (std::size_t i = 1; i < words.size(); ++i) text += " " + words[i];
  prompt = tokenizer.encode(text);
  if (prompt.empty()) throw headpool::ArgumentError("PROMPT has no token");
  std::string shown;
  std::vector<std::uint32_t> ids;
  print = [&](headpool::Token token) {  // a token may be a part of a character, so all of the text is decoded each time
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) return;  // which need not be special ones
    ids.push_back(static_cast<std::uint32_t>(token));
    const std::string all = tokenizer.decode(ids);
    if (all.size() < shown.size() || all.ends_with("\uFFFD")) return;
    std::fputs(all.c_str() + shown.size(), stdout);
    shown = all;
  };
#else
  for (const std::string& word : words)
    prompt.push_back(number("built without -DTOKENIZERS_CPP (see README), token id", word, 0, INT32_MAX));
#endif

  // 2. The model, and a session that has room for what is to come. More sessions of the model would share its weights.
  const headpool::Model model = headpool::Model::open(bundle, how);
  stops = model.info().stop_ids;
  headpool::SessionOptions room;
  room.capacity = static_cast<std::int64_t>(prompt.size()) + count;
  headpool::Session session(model, room);

  // 3. Prefill, then a token at a time until one that ends the text.
  headpool::GenerateOptions options;
  options.max_new_tokens = count;
  options.sampling = {.temperature = 0, .top_k = 0, .top_p = 1, .seed = 0};  // greedy
  options.stop_ids = stops;
  const std::span<const headpool::Token> prompts[] = {prompt};
  headpool::generate(session, prompts, options, [&](std::span<const headpool::Token> tokens) {
    print(tokens[0]);
    return std::fflush(stdout) == 0;  // false stops here
  });
  if (std::ferror(stdout)) throw std::runtime_error("the tokens cannot be written");
  std::fprintf(stderr, "\n%lld tokens in the cache: %.1f kB of K and V\n", static_cast<long long>(session.lengths()[0]),
               static_cast<double>(session.kv_bytes()) / 1e3);
}

}  // namespace

int main(int argc, char** argv) {
  return run_example("generate", USAGE, argc, argv, [](Words words) {
    headpool::ModelOptions how;
    how.backend = take_backend(words, USAGE);
    expect_count(words, 4, SIZE_MAX, USAGE);
    how.variant = words[1];
    run(words[0], how, number("NEW-TOKENS", words[2], 1, INT32_MAX), {words.begin() + 3, words.end()});
  });
}
