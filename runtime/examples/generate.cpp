// Generates tokens from a bundle, printing each as it is known:
//
//     generate bundle g4.fused 20 1 504 3575 282        20 new tokens after the ids 1 504 3575 282; "" is the first variant
//     generate bundle g4.fused 20 "The capital of"      the same in text, where it was built with tokenizers-cpp
//     generate t5-bundle "" 20 1 504 3575 282           what an encoder-decoder says to this source
//     generate --backend tensorrt-rtx bundle …          on the engines that headpool build made
//
// https://github.com/mlc-ai/tokenizers-cpp reads the tokenizer.json in a bundle: cmake -DTOKENIZERS_CPP=/path/to/its/checkout
#include <headpool/generate.hpp>

#include "arguments.hpp"

#ifdef HEADPOOL_TOKENIZERS_CPP
#include <tokenizers_cpp.h>

#include <fstream>
#include <iterator>
#endif

namespace {

constexpr const char* USAGE = "generate [--backend NAME] BUNDLE VARIANT NEW-TOKENS PROMPT…";

void run(const std::string& bundle, const headpool::ModelOptions& how, std::int64_t count, const Words& words) {
  // 1. The prompt as token ids, and what prints new ones.
  std::vector<headpool::Token> prompt;
  std::function<void(headpool::Token)> print = [](headpool::Token token) {
    std::printf("%lld\n", static_cast<long long>(token));
  };
#ifdef HEADPOOL_TOKENIZERS_CPP
  std::ifstream file(bundle + "/tokenizer.json", std::ios::binary);
  const std::string json{std::istreambuf_iterator<char>(file), {}};
  if (json.empty())
    throw headpool::BundleError(bundle + " has no tokenizer.json; pass token ids to a build without tokenizers-cpp");
  const auto tokenizer = tokenizers::Tokenizer::FromBlobJSON(json);
  for (const std::string& word : words)
    for (const int id : tokenizer->Encode(word)) prompt.push_back(id);
  std::string shown;
  std::vector<int> ids;
  print = [&](headpool::Token token) {  // a token may be a part of a character, so all of the text is decoded each time
    ids.push_back(static_cast<int>(token));
    const std::string text = tokenizer->Decode(ids);
    if (text.size() < shown.size() || text.ends_with("\uFFFD")) return;
    std::fputs(text.c_str() + shown.size(), stdout);
    shown = text;
  };
#else
  for (const std::string& word : words)
    prompt.push_back(number("built without -DTOKENIZERS_CPP (see README), token id", word, 0, INT32_MAX));
#endif

  // 2. The model, and a session that has room for what is to come. More sessions of the model would share its weights.
  const headpool::Model model = headpool::Model::open(bundle, how);
  headpool::SessionOptions room;
  room.capacity = static_cast<std::int64_t>(prompt.size()) + count;
  headpool::Session session(model, room);

  // 3. Prefill, then a token at a time until one that ends the text.
  headpool::GenerateOptions options;
  options.max_new_tokens = count;
  options.sampling = {.temperature = 0, .top_k = 0, .top_p = 1, .seed = 0};  // greedy
  options.stop_ids = model.info().stop_ids;
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
