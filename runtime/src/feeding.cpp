#include "feeding.hpp"

#include <algorithm>

namespace headpool::detail {
namespace {

Feed empty_feed(std::size_t batch, std::int64_t T) {
  const std::size_t count = batch * static_cast<std::size_t>(T);
  return {T, std::vector<Token>(count, PAD), std::vector<std::int64_t>(count), std::vector<std::int64_t>(batch)};
}

std::int64_t length(std::span<const Token> prompt) { return static_cast<std::int64_t>(prompt.size()); }

// Tokens from done[b] to ends[b] of each prompt, the first of which goes to position starts[b]; moves done and starts on.
void add_rectangles(std::vector<Feed>& feeds, Prompts prompts, const std::vector<std::int64_t>& ends,
                    std::vector<std::int64_t>& done, std::vector<std::int64_t>& starts, std::int64_t capacity,
                    std::int64_t chunk) {
  for (;;) {
    std::int64_t left = 0;
    for (std::size_t b = 0; b < prompts.size(); ++b) left = std::max(left, ends[b] - done[b]);
    if (!left) return;
    const std::int64_t T = std::min({chunk, left, capacity - *std::max_element(starts.begin(), starts.end())});
    Feed feed = empty_feed(prompts.size(), T);
    for (std::size_t b = 0; b < prompts.size(); ++b) {
      const std::int64_t count = feed.counts[b] = std::min(T, ends[b] - done[b]);
      std::copy_n(prompts[b].begin() + done[b], count, feed.tokens.begin() + static_cast<std::int64_t>(b) * T);
      for (std::int64_t t = 0; t < T; ++t)
        feed.positions[b * static_cast<std::size_t>(T) + static_cast<std::size_t>(t)] = starts[b] + t;
      done[b] += count, starts[b] += count;
    }
    feeds.push_back(std::move(feed));
  }
}

}  // namespace

std::string prompt_name(std::size_t row, std::size_t batch, const std::string& what) {
  return batch > 1 ? what + "s[" + std::to_string(row) + "]" : "the " + what;
}

std::vector<Feed> right_padded(Prompts prompts, std::span<const std::int64_t> lengths, std::int64_t capacity,
                               std::int64_t chunk) {
  std::vector<Feed> feeds;
  std::vector<std::int64_t> ends, done(prompts.size()), starts(lengths.begin(), lengths.end());
  for (const auto& prompt : prompts) ends.push_back(length(prompt));
  const bool equal = std::equal(ends.begin() + 1, ends.end(), ends.begin());
  if (!equal) {
    for (auto& end : ends) --end;
    add_rectangles(feeds, prompts, ends, done, starts, capacity, chunk);
    for (auto& end : ends) ++end;
  }
  add_rectangles(feeds, prompts, ends, done, starts, capacity, chunk);
  return feeds;
}

Feed whole(Prompts prompts) {
  std::vector<Feed> feeds;
  std::vector<std::int64_t> ends, done(prompts.size()), starts(prompts.size());
  for (const auto& prompt : prompts) ends.push_back(length(prompt));
  const std::int64_t longest = *std::max_element(ends.begin(), ends.end());
  add_rectangles(feeds, prompts, ends, done, starts, longest, longest);
  return std::move(feeds.front());
}

std::vector<Feed> left_padded(Prompts prompts, std::span<const std::int64_t> lengths, std::int64_t chunk) {
  std::vector<Feed> feeds;
  std::int64_t width = 0;
  for (const auto& prompt : prompts) width = std::max(width, length(prompt));
  for (std::int64_t start = 0; start < width; start += chunk) {
    Feed feed = empty_feed(prompts.size(), std::min(chunk, width - start));
    for (std::size_t b = 0; b < prompts.size(); ++b) {
      const std::int64_t pads = width - length(prompts[b]);
      for (std::int64_t t = 0; t < feed.T; ++t) {
        const std::int64_t index = start + t - pads;  // in the prompt; below 0: a pad
        const std::size_t to = b * static_cast<std::size_t>(feed.T) + static_cast<std::size_t>(t);
        if (index >= 0) feed.tokens[to] = prompts[b][static_cast<std::size_t>(index)], ++feed.counts[b];
        feed.positions[to] = std::max<std::int64_t>(0, lengths[b] + std::max<std::int64_t>(index, -1));
      }
    }
    feeds.push_back(std::move(feed));
  }
  return feeds;
}

}  // namespace headpool::detail
