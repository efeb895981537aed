// How prompts of unequal lengths are cut into rectangular calls of a graph, for each cache form; exporter/engines/feeding.py.
//
// Letters: B batch, T new tokens of one call.
#pragma once

#include <headpool/session.hpp>
#include <string>
#include <vector>

namespace headpool::detail {

constexpr std::int64_t MOST_SEQUENCES = 65536;  // of a batch
constexpr Token PAD = 0;                        // any valid token: what it writes is overwritten or masked

// As people count: "the prompt", or "prompt 2" of several.
std::string prompt_name(std::size_t row, std::size_t batch, const std::string& what = "prompt");

// One call: tokens and positions [B, T], and how many tokens of each row are real.
struct Feed {
  std::int64_t T;
  std::vector<Token> tokens;
  std::vector<std::int64_t> positions, counts;
};

// Calls for a static cache, where row b writes from cache row lengths[b] on and a token sees the rows up to its own.
//
// The pads of a row write after its end, where its next real token overwrites them before anything sees them. So that one
// last call gives every row's newest logits, prompts of unequal lengths keep their last token back for a call of T = 1.
// No pad is written past `capacity`: T shrinks near it.
std::vector<Feed> right_padded(Prompts prompts, std::span<const std::int64_t> lengths, std::int64_t capacity,
                               std::int64_t chunk);

// Calls for a concat cache, where new columns are appended for all rows alike and the mask hides the pads, the first T −
// counts[b] of row b. Every prompt ends in the last column. A pad's position is 0 or the last one's.
std::vector<Feed> left_padded(Prompts prompts, std::span<const std::int64_t> lengths, std::int64_t chunk);

// All in one call from position 0 on, padded on the right: what an encoder reads.
Feed whole(Prompts prompts);

}  // namespace headpool::detail
