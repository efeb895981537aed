#include <headpool/headpool.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <headpool/generate.hpp>
#include <new>

#include "feeding.hpp"

struct hp_model {
  headpool::Model model;
};

struct hp_session {
  headpool::Session session;
};

struct hp_sampler {
  headpool::Sampler sampler;
  std::size_t batch;
};

namespace {

thread_local std::string last_error;

hp_status failed(hp_status status, const char* message) noexcept {
  try {
    last_error =
        headpool::Error(static_cast<headpool::ErrorCode>(status), message).what();  // a callback's may be of several lines
  } catch (...) {
    last_error.clear();  // no memory for the message
  }
  return status;
}

template <class Work>
hp_status guarded(const Work& work) noexcept {
  try {
    work();
    return HP_OK;
  } catch (const headpool::Error& error) {
    return failed(static_cast<hp_status>(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return failed(HP_MEMORY, "not enough memory");
  } catch (const std::exception& error) {
    return failed(HP_INTERNAL, error.what());
  } catch (...) {
    return failed(HP_INTERNAL, "an error of an unknown kind");
  }
}

template <class... Pointers>
void expect(const char* function, Pointers... pointers) {
  if (!(... && pointers)) throw headpool::ArgumentError(std::string(function) + " was given NULL");
}

template <class Struct>
std::size_t size_of(const char* type, const Struct* given) {
  if (given->size < sizeof(std::size_t) || given->size > 4096)
    throw headpool::ArgumentError("the size in an " + std::string(type) + " is " + std::to_string(given->size) + ", not " +
                                  std::to_string(sizeof(Struct)) + "; begin it with HP_INIT(" + type + ")");
  return given->size;
}

// The caller's options as far as it knows them, zeros for the others. A newer caller's members that this library does not know
// have to be zeros too.
template <class Options>
Options known(const char* type, const Options* given) {
  Options options{};
  if (!given) return options;
  const std::size_t size = size_of(type, given);
  std::memcpy(static_cast<void*>(&options), given, std::min(size, sizeof(Options)));
  const auto* const bytes = reinterpret_cast<const unsigned char*>(given);
  if (size > sizeof(Options) && std::any_of(bytes + sizeof(Options), bytes + size, [](int byte) { return byte != 0; }))
    throw headpool::ArgumentError("an " + std::string(type) +
                                  " sets what headpool " HEADPOOL_VERSION
                                  " does not know; link the library that its header came with");
  return options;
}

headpool::Sampling sampling_of(const hp_sampling* given) {
  const hp_sampling options = known("hp_sampling", given);
  return {options.temperature, options.top_k, options.top_p, options.seed};
}

std::vector<std::span<const headpool::Token>> spans(const std::int64_t* const* prompts, const std::size_t* counts,
                                                    std::size_t batch) {
  std::vector<std::span<const headpool::Token>> result;
  for (std::size_t b = 0; b < batch; ++b) {
    const std::string name = headpool::detail::prompt_name(b, batch);
    if (!prompts[b] && counts[b]) throw headpool::ArgumentError(name + " is NULL");
    if (counts[b] > PTRDIFF_MAX / sizeof(headpool::Token))
      throw headpool::ArgumentError(name + " of " + std::to_string(counts[b]) + " tokens has no address");
    result.emplace_back(prompts[b], counts[b]);
  }
  return result;
}

hp_model_info info_of(std::size_t size, const headpool::ModelInfo& from, const headpool::BackendInfo& backend, int threads) {
  return {size,
          from.variant.c_str(),
          from.pattern.c_str(),
          from.cache.c_str(),
          from.dtype.c_str(),
          from.vocab_size,
          from.max_positions,
          from.heads,
          static_cast<std::int64_t>(from.kv_heads.size()),
          from.kv_heads.data(),
          from.stop_ids.data(),
          from.stop_ids.size(),
          from.weight_bytes,
          from.kv_bytes_per_token,
          threads,
          from.encoder_layers,
          backend.name.c_str(),
          backend.provider.c_str(),
          backend.library.c_str(),
          backend.version.c_str(),
          from.quantize.c_str(),
          from.cache_dtype.c_str()};
}

void expect_batch(const hp_session* session, std::size_t batch) {
  if (static_cast<std::int64_t>(batch) != session->session.batch())
    throw headpool::ArgumentError(std::to_string(batch) + " sequences for a session of batch " +
                                  std::to_string(session->session.batch()));
}

}  // namespace

uint32_t hp_abi_version(void) { return HP_ABI_VERSION; }
const char* hp_version(void) { return HEADPOOL_VERSION; }

const char* hp_onnxruntime_version(void) {
  static const std::string version = [] {
    std::string found;
    guarded([&] { found = headpool::onnxruntime_version(); });
    return found;
  }();
  return version.empty() ? nullptr : version.c_str();
}

const char* hp_last_error(void) { return last_error.c_str(); }

hp_status hp_variants(const char* bundle, hp_on_variant on_variant, void* user) {
  return guarded([&] {
    expect("hp_variants", bundle, on_variant);
    for (const headpool::ModelInfo& variant : headpool::variants(bundle)) {
      const hp_model_info info = info_of(sizeof info, variant, {}, 0);
      on_variant(user, &info);
    }
  });
}

hp_status hp_model_open(const char* bundle, const hp_model_options* options, hp_model** out) {
  return guarded([&] {
    expect("hp_model_open", bundle, out);
    const hp_model_options o = known("hp_model_options", options);
    headpool::ModelOptions chosen{o.variant ? o.variant : "", o.threads, o.backend ? o.backend : ""};
    *out = new hp_model{headpool::Model::open(bundle, chosen)};
  });
}

void hp_model_free(hp_model* model) { delete model; }

hp_status hp_model_get_info(const hp_model* model, hp_model_info* info) {
  return guarded([&] {
    expect("hp_model_get_info", model, info);
    const std::size_t size = size_of("hp_model_info", info);
    const hp_model_info all = info_of(size, model->model.info(), model->model.backend(), model->model.threads());
    std::memcpy(info, &all, std::min(size, sizeof all));
  });
}

hp_status hp_session_create(const hp_model* model, const hp_session_options* options, hp_session** out) {
  return guarded([&] {
    expect("hp_session_create", model, out);
    const hp_session_options o = known("hp_session_options", options);
    *out = new hp_session{headpool::Session(model->model, {o.batch ? o.batch : 1, o.capacity, o.chunk ? o.chunk : 512})};
  });
}

void hp_session_free(hp_session* session) { delete session; }

hp_status hp_session_prefill(hp_session* session, const int64_t* const* prompts, const size_t* counts, size_t batch,
                             const float** logits) {
  return guarded([&] {
    expect("hp_session_prefill", session, prompts, counts, logits);
    expect_batch(session, batch);
    *logits = session->session.prefill(spans(prompts, counts, batch)).data();
  });
}

hp_status hp_session_decode(hp_session* session, const int64_t* tokens, size_t batch, const float** logits) {
  return guarded([&] {
    expect("hp_session_decode", session, tokens, logits);
    *logits = session->session.decode(std::span(tokens, batch)).data();
  });
}

hp_status hp_session_rewind(hp_session* session, int64_t length) {
  return guarded([&] {
    expect("hp_session_rewind", session);
    session->session.rewind(length);
  });
}

int64_t hp_session_batch(const hp_session* session) { return session ? session->session.batch() : 0; }
int64_t hp_session_capacity(const hp_session* session) { return session ? session->session.capacity() : 0; }
uint64_t hp_session_kv_bytes(const hp_session* session) { return session ? session->session.kv_bytes() : 0; }
const int64_t* hp_session_lengths(const hp_session* session) { return session ? session->session.lengths().data() : nullptr; }

hp_status hp_sampler_create(const hp_sampling* sampling, int64_t batch, hp_sampler** out) {
  return guarded([&] {
    expect("hp_sampler_create", out);
    *out = new hp_sampler{headpool::Sampler(sampling_of(sampling), batch), static_cast<std::size_t>(batch)};
  });
}

void hp_sampler_free(hp_sampler* sampler) { delete sampler; }

hp_status hp_sampler_pick(hp_sampler* sampler, const float* logits, size_t vocab_size, int64_t* tokens) {
  return guarded([&] {
    expect("hp_sampler_pick", sampler, logits, tokens);
    if (vocab_size > static_cast<std::size_t>(INT64_MAX) / sizeof(float) / sampler->batch)
      throw headpool::ArgumentError("a vocabulary of " + std::to_string(vocab_size) + " tokens");
    const auto picked = sampler->sampler.pick({logits, vocab_size * sampler->batch});
    std::copy(picked.begin(), picked.end(), tokens);
  });
}

hp_status hp_generate(hp_session* session, const int64_t* const* prompts, const size_t* counts, size_t batch,
                      int64_t max_new_tokens, const hp_sampling* sampling, const int64_t* stop_ids, size_t stop_id_count,
                      hp_on_tokens on_tokens, void* user) {
  return guarded([&] {
    expect("hp_generate", session, prompts, counts, on_tokens, stop_ids || !stop_id_count);
    expect_batch(session, batch);
    headpool::GenerateOptions options{max_new_tokens, sampling_of(sampling), {}};
    options.stop_ids.assign(stop_ids, stop_ids + stop_id_count);
    headpool::generate(session->session, spans(prompts, counts, batch), options, [&](std::span<const headpool::Token> tokens) {
      return on_tokens(user, tokens.data(), tokens.size()) == 0;
    });
  });
}
