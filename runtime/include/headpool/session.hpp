// Tokens in, logits out, over a KV cache.
//
//     headpool::Session session(headpool::Model::open("bundle"));
//     std::span<const float> logits = session.prefill(prompt);
//     while (…) logits = session.decode(next_token);
//
// Letters: B sequences of a batch, V vocabulary size.
#pragma once

#include <cstdint>
#include <headpool/model.hpp>
#include <memory>
#include <span>

namespace headpool {

struct SessionOptions {
  std::int64_t batch = 1;  // at most 65536; of TensorRT that of an engine
  // Tokens of a sequence. 0, or more than the model's max_positions: those; 0 of TensorRT: an engine's; 0 of an
  // encoder-decoder, whose positions end nowhere: at most 8192. A decoder in pattern fused has its cache bound once where this
  // is not 0, in memory for all of it; else it grows.
  std::int64_t capacity = 0;
  std::int64_t chunk = 512;  // most tokens of a sequence in one call of the graph, which bounds the memory of a long prefill
};

using Prompts = std::span<const std::span<const Token>>;

inline constexpr Token ENDED = -1;  // in place of the token of a sequence that has ended

// B sequences in step, each with a length of its own, over one cache in memory that is reserved once and used as it fills.
//
// A static cache is written in place and grows by a sixteenth at a time, or is bound once (SessionOptions::capacity); a concat
// cache is written anew by each step, which is how graphs of that form work. On a GPU the cache lies in its memory, all of it
// from the start; on TensorRT decoding replays one CUDA graph.
//
// Decoding on the CPU allocates nothing after each thread's first step: neither operator new nor malloc is called by this
// library, its operators of pattern fused among it. ONNX Runtime does within its own calls: in every Run, and where memory is
// bound anew, which is when a static cache grows, and at each step of a concat cache.
//
// An encoder-decoder reads a source in its first prefill: the encoder takes all of it at once, and the decoder the start token.
// What is decoded then is its output. lengths() and capacity() count both, without the start token; the source stays whole
// until reset().
//
// Threads: a session may be moved to another thread, but is used by one at a time. Different sessions, of one model too, may
// run at the same time.
//
// A session that was moved from is of batch 0, holds nothing, and throws ArgumentError of all that computes, reset() too, until
// another is assigned to it; only model() must not be asked.
class HEADPOOL_API Session {
 public:
  // Throws ArgumentError, MemoryError. A TensorRT engine is loaded by the first session that needs it: BundleError,
  // BackendError.
  explicit Session(Model model, const SessionOptions& options = {});
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;
  ~Session();

  // Feeds a prompt to each sequence, of any lengths but none empty, after what is in the cache; a source to an encoder-decoder
  // that holds none. Returns the logits [B, V] of each one's last token, of an encoder-decoder of the start token, valid until
  // the next call. Throws ArgumentError and CapacityError, before anything is fed, and BackendError, after which the tokens
  // that lengths() counts are in the cache.
  std::span<const float> prefill(Prompts prompts);
  std::span<const float> prefill(std::span<const Token> prompt);  // of a batch of 1

  // Feeds one token to each sequence. Returns logits [B, V], in fp32 on ONNX Runtime the very memory that the graph wrote;
  // valid until the next call. Throws as prefill does, and ArgumentError of an encoder-decoder without a source.
  //
  // A sequence whose token is ENDED stays as it is, and its logits mean nothing; it needs room for one token all the same, and
  // one sequence at least has to go on. It goes on itself with its next token or prompt; but in an encoder-decoder's concat
  // cache, which holds all sequences in step, first the session has to be reset, or rewound to what all of them hold.
  std::span<const float> decode(std::span<const Token> tokens);
  std::span<const float> decode(Token token);  // of a batch of 1

  // The logits [V] of one sequence, from 0, that the last call returned. Throws ArgumentError where there are none: before the
  // first call, after rewind and reset, after a call that failed on the way, and of a sequence whose token was ENDED.
  std::span<const float> logits(std::int64_t sequence) const;

  // Forgets all but the first `length` tokens of every sequence. Throws ArgumentError where one holds fewer, and of an
  // encoder-decoder where sources differ in length or would not stay whole.
  void rewind(std::int64_t length);
  void reset();

  const Model& model() const noexcept;
  std::int64_t batch() const noexcept;
  std::int64_t capacity() const noexcept;                  // tokens of a sequence
  std::span<const std::int64_t> lengths() const noexcept;  // tokens of each sequence in the cache
  std::uint64_t kv_bytes() const noexcept;                 // that those tokens take

 private:
  struct State;
  State& state() const;
  std::unique_ptr<State> state_;
};

}  // namespace headpool
