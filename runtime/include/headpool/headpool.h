/* headpool's C ABI: what headpool/session.hpp and headpool/generate.hpp offer, for C and for every language that calls C.
 *
 *     hp_model* model = NULL;
 *     hp_session* session = NULL;
 *     if (hp_model_open("bundle", NULL, &model) || hp_session_create(model, NULL, &session))
 *       fprintf(stderr, "%s\n", hp_last_error());
 *
 * Every function that can fail returns an hp_status and leaves its outputs as they were when it does; hp_last_error() then says
 * why. Handles are freed by the caller, in any order: a session keeps its model. NULL is freed as nothing. NULL where something
 * is due is HP_ARGUMENT; a function that has no status to give answers a session that is NULL with 0 or NULL.
 *
 * Options are structs whose first member is their size, set by HP_INIT, so that a program built for an older version of this
 * header goes on working; NULL stands for the defaults, and so does 0 or NULL in each other member. What a newer header's
 * struct sets beyond what this library knows is HP_ARGUMENT.
 *
 * Threads: models may be used from several threads at once, a session or a sampler by one at a time, different ones together.
 *
 * Files: a bundle that is open may be moved or removed, or another put in its place, but its files must not be written over or
 * cut short where they lie; headpool/model.hpp says why.
 */
#ifndef HEADPOOL_H
#define HEADPOOL_H

#include <headpool/api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HP_ABI_VERSION 1 /* grows when a program built for an older one would not work any more */

/* The ABI version of the library that is running. */
HEADPOOL_API uint32_t hp_abi_version(void);
/* Of the library, for example "0.1.0", never NULL; and of the ONNX Runtime under it, NULL where that is older than the one the
 * library was built for (hp_last_error() says which). Both last as long as the program. */
HEADPOOL_API const char* hp_version(void);
HEADPOOL_API const char* hp_onnxruntime_version(void);

typedef int32_t hp_status;
enum {
  HP_OK = 0,
  HP_ARGUMENT = 1, /* the caller's: a token outside the vocabulary, a wrong number of prompts, NULL where something is due */
  HP_BUNDLE = 2,   /* the bundle is missing, damaged, of another schema, or points outside its folder */
  HP_CAPACITY = 3, /* the tokens do not fit the session's capacity; nothing was fed: rewind, or make a session with more */
  HP_BACKEND = 4,  /* it is not in this library, has no GPU, cannot load the graph or the engine, or failed in a step */
  HP_MEMORY = 5,   /* not enough of it; within ONNX Runtime's start of threads that may end the process */
  HP_INTERNAL = 6  /* anything else */
};

/* The message of the last failure in this thread, one line, valid until the next; "" where there was none. Never NULL. */
HEADPOOL_API const char* hp_last_error(void);

/* hp_session_options options = HP_INIT(hp_session_options); of the four structs below: their size, and zeros. */
#define HP_INIT(type) HP_INIT_##type

typedef struct hp_model hp_model;
typedef struct hp_session hp_session;
typedef struct hp_sampler hp_sampler;

typedef struct {
  size_t size;
  const char* variant; /* NULL or "": the bundle's first */
  int32_t threads;     /* of one operator, at most 1024; 0: headpool/model.hpp's default_threads() */
  /* NULL or "": "onnxruntime", the CPU. "onnxruntime-cuda", the first GPU: where the library of onnxruntime-gpu is, without
   * pattern fused and without concat caches. "tensorrt", "tensorrt-rtx": where built with that SDK, engines of decoder-only
   * models that headpool build made for this GPU. */
  const char* backend;
} hp_model_options;
#define HP_INIT_hp_model_options {sizeof(hp_model_options), NULL, 0, NULL}

HEADPOOL_API hp_status hp_model_open(const char* bundle, const hp_model_options* options, hp_model** out);
HEADPOOL_API void hp_model_free(hp_model* model);

/* Texts and lists live as long as the model. */
typedef struct {
  size_t size;
  const char *variant, *pattern, *cache, *dtype; /* headpool/model.hpp's ModelInfo, as what follows */
  int64_t vocab_size, max_positions, heads, layers;
  const int64_t* kv_heads; /* [layers] */
  const int64_t* stop_ids;
  size_t stop_id_count;
  uint64_t weight_bytes, kv_bytes_per_token;
  int32_t threads;
  int64_t encoder_layers; /* of an encoder-decoder, whose other sizes are its decoder's; 0: it has no encoder */
  const char *backend, *provider, *library, *library_version; /* headpool/model.hpp's BackendInfo */
  const char* quantize;                                       /* "int8", "int4-128" and so on, its matrices; "": in dtype */
  const char* cache_dtype;                                    /* "fp16" or "int8", how its caches are stored; "": in dtype */
} hp_model_info;
#define HP_INIT_hp_model_info \
  {sizeof(hp_model_info), NULL, NULL, NULL, NULL, 0, 0, 0, 0, NULL, NULL, 0, 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL}

/* Called with what a bundle says of one of its variants; its texts and lists last as long as the call. `threads` is 0 and the
 * backend's texts are "". */
typedef void (*hp_on_variant)(void* user, const hp_model_info* info);
/* All that the bundle holds, in its order. Nothing but headpool.json is read. */
HEADPOOL_API hp_status hp_variants(const char* bundle, hp_on_variant on_variant, void* user);

/* Fills the members that `info->size` has room for. No text is NULL; lists are where they are empty. */
HEADPOOL_API hp_status hp_model_get_info(const hp_model* model, hp_model_info* info);

typedef struct {
  size_t size;
  int64_t batch; /* sequences, at most 65536; 0: 1; of TensorRT an engine's */
  /* Tokens of a sequence, prompts and new ones together, of an encoder-decoder the source's too. More than the model's
   * max_positions: those. 0: those as well, of an encoder-decoder at most 8192, of TensorRT an engine's. A decoder in pattern
   * fused has its cache bound once where this is not 0, in memory for all of it; else it grows. */
  int64_t capacity;
  int64_t chunk; /* most tokens of a sequence in one call of the graph; 0: 512 */
} hp_session_options;
#define HP_INIT_hp_session_options {sizeof(hp_session_options), 0, 0, 0}

HEADPOOL_API hp_status hp_session_create(const hp_model* model, const hp_session_options* options, hp_session** out);
HEADPOOL_API void hp_session_free(hp_session* session);

/* Feeds prompts[b] of counts[b] tokens to each of `batch` sequences; of an encoder-decoder to its encoder, once, and then the
 * start token to its decoder. *logits becomes float [batch, vocab_size], of each one's last token, valid until the session's
 * next call. */
HEADPOOL_API hp_status hp_session_prefill(hp_session* session, const int64_t* const* prompts, const size_t* counts,
                                          size_t batch, const float** logits);
/* Feeds one token to each sequence; none to one whose token is HP_ENDED, which stays as it is and whose logits mean nothing. It
 * needs room for one token all the same, and one sequence at least has to go on. *logits as of hp_session_prefill. */
#define HP_ENDED (-1)
HEADPOOL_API hp_status hp_session_decode(hp_session* session, const int64_t* tokens, size_t batch, const float** logits);
/* Forgets all but the first `length` tokens of every sequence. An encoder's inputs stay whole, or go with 0. */
HEADPOOL_API hp_status hp_session_rewind(hp_session* session, int64_t length);

/* Of a session that is NULL: 0, 0, 0 and NULL. */
HEADPOOL_API int64_t hp_session_batch(const hp_session* session);
HEADPOOL_API int64_t hp_session_capacity(const hp_session* session);       /* tokens of a sequence */
HEADPOOL_API uint64_t hp_session_kv_bytes(const hp_session* session);      /* of the tokens now in the cache */
HEADPOOL_API const int64_t* hp_session_lengths(const hp_session* session); /* [batch], valid until the next call */

/* All zeros but for the size is greedy. headpool/generate.hpp's Sampling. */
typedef struct {
  size_t size;
  double temperature; /* 0: the most likely token */
  int64_t top_k;      /* 0: all */
  double top_p;       /* 0 or 1: all */
  uint64_t seed;
} hp_sampling;
#define HP_INIT_hp_sampling {sizeof(hp_sampling), 0, 0, 0, 0}

HEADPOOL_API hp_status hp_sampler_create(const hp_sampling* sampling, int64_t batch, hp_sampler** out);
HEADPOOL_API void hp_sampler_free(hp_sampler* sampler);
/* The next token of each sequence into tokens[batch], from logits [batch, vocab_size]; −inf is never drawn. */
HEADPOOL_API hp_status hp_sampler_pick(hp_sampler* sampler, const float* logits, size_t vocab_size, int64_t* tokens);

/* Called with the new token of each sequence, HP_ENDED of one that has met a stop token before, valid during the call; 0 goes
 * on, anything else stops, and hp_generate returns HP_OK. */
typedef int32_t (*hp_on_tokens)(void* user, const int64_t* tokens, size_t batch);

/* Feeds the prompts, as hp_session_prefill does, and generates, a sequence until it draws one of `stop_ids` (which `on_tokens`
 * gets too), all until `max_new_tokens`. A sequence's last token is not fed, and what it holds does not change after its end
 * while others go on: its next prompt begins with that token where it is to be seen. HP_CAPACITY before the first token where
 * a sequence's tokens, its prompt and max_new_tokens − 1 are more than the capacity. `sampling` may be NULL (greedy), and so
 * may `stop_ids` where there are none; `on_tokens` may not. */
HEADPOOL_API hp_status hp_generate(hp_session* session, const int64_t* const* prompts, const size_t* counts, size_t batch,
                                   int64_t max_new_tokens, const hp_sampling* sampling, const int64_t* stop_ids,
                                   size_t stop_id_count, hp_on_tokens on_tokens, void* user);

#ifdef __cplusplus
}
#endif
#endif
