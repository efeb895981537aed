// The words of an example's command line, and its exit code: 2 after one line that says what is wrong with them.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <headpool/error.hpp>
#include <stdexcept>
#include <string>
#include <vector>

using Words = std::vector<std::string>;

// The whole of `word` as a number. Throws ArgumentError where it is none from `least` to `most`.
inline std::int64_t number(const std::string& what, const std::string& word, std::int64_t least, std::int64_t most) {
  std::int64_t value = 0;
  const char* const end = word.data() + word.size();
  const auto [read, failure] = std::from_chars(word.data(), end, value);
  if (failure != std::errc() || read != end || value < least || value > most)
    throw headpool::ArgumentError(what + " \"" + word + "\" is not a whole number from " + std::to_string(least) + " to " +
                                  std::to_string(most));
  return value;
}

// Takes --backend NAME from the beginning of `words`; without it, "". Throws ArgumentError of any other option.
inline std::string take_backend(Words& words, const char* usage) {
  if (words.empty() || !words[0].starts_with("--")) return "";
  if (words[0] != "--backend") throw headpool::ArgumentError("option " + words[0] + " is unknown; usage: " + usage);
  if (words.size() < 2 || words[1].empty())
    throw headpool::ArgumentError("--backend lacks a name; choose from onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx");
  const std::string name = words[1];
  words.erase(words.begin(), words.begin() + 2);
  return name;
}

// Throws ArgumentError where there are fewer or more words than `usage` has.
inline void expect_count(const Words& words, std::size_t least, std::size_t most, const char* usage) {
  if (words.size() < least || words.size() > most) throw headpool::ArgumentError(std::string("usage: ") + usage);
}

// What `main` returns: 0 after `work` on the words, or after `usage` where they begin with --help, 2 where it throws.
template <class Work>
int run_example(const char* name, const char* usage, int argc, char** argv, const Work& work) {
  try {
    const Words words(argv + (argc > 0), argv + argc);
    if (!words.empty() && (words[0] == "--help" || words[0] == "-h"))
      std::printf("usage: %s\n", usage);
    else
      work(words);
    if (std::fflush(stdout) != 0) throw std::runtime_error("standard output cannot be written");
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 2;
  }
}
