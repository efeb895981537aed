// The most likely token after one prompt: consumer BUNDLE ID…
#include <algorithm>
#include <cstdlib>
#include <headpool/session.hpp>
#include <iostream>

int main(int argc, char** argv) try {
  headpool::Session session(headpool::Model::open(argc > 1 ? argv[1] : "bundle"));
  std::vector<headpool::Token> prompt;
  for (int i = 2; i < argc; ++i) prompt.push_back(std::atoll(argv[i]));
  const auto logits = session.prefill(prompt);
  std::cout << std::max_element(logits.begin(), logits.end()) - logits.begin() << '\n';
} catch (const headpool::Error& error) {
  std::cerr << error.what() << '\n';
  return static_cast<int>(error.code());
}
