// The most likely token after one prompt: consumer BUNDLE ID…
#include <algorithm>
#include <charconv>
#include <cstring>
#include <headpool/session.hpp>
#include <iostream>

int main(int argc, char** argv) try {
  headpool::Session session(headpool::Model::open(argc > 1 ? argv[1] : "bundle"));
  std::vector<headpool::Token> prompt;
  for (int i = 2; i < argc; ++i) {
    const char* const end = argv[i] + std::strlen(argv[i]);
    if (std::from_chars(argv[i], end, prompt.emplace_back()).ptr != end)
      throw headpool::ArgumentError(argv[i] + std::string(" is no token id"));
  }
  const auto logits = session.prefill(prompt);
  std::cout << std::max_element(logits.begin(), logits.end()) - logits.begin() << '\n';
} catch (const headpool::Error& error) {
  std::cerr << error.what() << '\n';
  return static_cast<int>(error.code());
}
