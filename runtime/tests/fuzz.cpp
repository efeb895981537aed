// What a bundle's files can say, mutated: headpool.json, engine.json and the graph must be read or refused, never crash.
//
// Built with clang's -fsanitize=fuzzer (cmake -DHEADPOOL_FUZZER=ON) libFuzzer drives it, which scripts/fuzz does. Otherwise its
// own main does, by blind mutations from a fixed seed: fuzz ROUNDS FILE…
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <string_view>

#include "../src/fields.hpp"
#include "../src/initializers.hpp"
#include "../src/manifest.hpp"
#include "../src/tensorrt/record.hpp"

namespace {

void expect(bool holds) {
  if (!holds) std::abort();
}

void expect_one_line(std::string_view message) {
  expect(!message.empty() && std::ranges::none_of(message, [](char c) { return (c >= 0 && c < ' ') || c == 0x7F; }));
}

void read_manifest(std::string_view text) try {
  for (const headpool::detail::Variant& variant : headpool::detail::parse_manifest(text)) {
    expect(headpool::detail::is_file_name(variant.graph));
    expect(std::ranges::all_of(variant.weights, headpool::detail::is_file_name));
    expect(!variant.encoder || headpool::detail::is_file_name(variant.encoder->graph));
    expect(variant.info.kv_bytes_per_token > 0);
  }
} catch (const headpool::BundleError& error) {
  expect_one_line(error.what());
}

void read_engines(std::string_view text) try {
  for (const headpool::detail::EngineRecord& engine : headpool::detail::parse_engines(text))
    expect(headpool::detail::is_file_name(engine.file));
} catch (const headpool::detail::Flaw& error) {
  expect_one_line(error.what());
}

void read_initializers(std::string_view bytes) try {
  headpool::detail::external_initializers(std::as_bytes(std::span(bytes)), "graph");
} catch (const headpool::BundleError& error) {
  expect_one_line(error.what());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  read_manifest(text);
  read_engines(text);
  read_initializers(text);
  return 0;
}

#ifndef HEADPOOL_FUZZER
namespace {

const std::string WORDS[] = {
    "-1",      "0",    "1e999", "9223372036854775808", "2147483648", "\"../x\"", "null", "[]", "{}", "\"\"", "[[", "\"",
    "\\u0000", "\xff", "true",  "\"cache\"",           ",",          ":"};

std::string mutated(std::string text, std::mt19937& random) {
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n ? n - 1 : 0)(random); };
  for (std::size_t times = 1 + below(4); times && !text.empty(); --times) {
    const std::size_t at = below(text.size()), length = below(16);
    switch (below(6)) {
      case 0:
        text[at] = static_cast<char>(below(256));
        break;
      case 1:
        text.erase(at, length);
        break;
      case 2:
        text.insert(at, text.substr(below(text.size()), length));
        break;
      case 3:
        text.replace(at, length, WORDS[below(std::size(WORDS))]);
        break;
      case 4:
        text.resize(at);
        break;
      default: {  // a value for another one
        const std::size_t colon = text.find(": ", at), end = text.find_first_of(",}\n", colon == text.npos ? 0 : colon);
        if (colon != text.npos && end != text.npos) text.replace(colon + 2, end - colon - 2, WORDS[below(std::size(WORDS))]);
      }
    }
  }
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 2 ? std::atoi(argv[1]) : 0;
  std::mt19937 random(1);
  for (int i = 2; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    for (int round = 0; round < rounds; ++round) {
      const std::string input = mutated(text, random);
      LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
    }
    std::printf("%d mutations of %s were read or refused\n", rounds, argv[i]);
  }
  return rounds > 0 ? 0 : 2;
}
#endif
