// Sessions as an application uses them, over every variant of a bundle of a tiny model: sessions BUNDLE. With a backend of
// TensorRT's, over those that have engines, of batch 1, 2 and 3 and 120 tokens: sessions_fake BUNDLE tensorrt
//
// Made for the sanitizers: many sessions made and ended, two threads at once, errors on the way. What the logits are worth is
// held against other implementations in tests/runtime.
#include <headpool/headpool.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <headpool/generate.hpp>
#include <stdexcept>
#include <thread>

#define CHECK(holds)                                                       \
  do {                                                                     \
    if (!(holds)) {                                                        \
      std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #holds); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace {

using headpool::Token;
using Row = std::vector<Token>;

constexpr int SESSIONS = 1000, MODELS = 10;

headpool::SessionOptions options(std::int64_t batch, std::int64_t capacity, std::int64_t chunk = 512) {
  headpool::SessionOptions result;
  result.batch = batch, result.capacity = capacity, result.chunk = chunk;
  return result;
}

std::vector<Row> texts(headpool::Session& session, const std::vector<Row>& prompts, std::int64_t count) {
  std::vector<std::span<const Token>> spans(prompts.begin(), prompts.end());
  std::vector<Row> result(prompts.size());
  headpool::GenerateOptions how;
  how.max_new_tokens = count;
  how.sampling = {.temperature = 1.5, .top_k = 20, .top_p = 0.95, .seed = 7};
  const auto calls = headpool::generate(session, spans, how, [&](std::span<const Token> tokens) {
    for (std::size_t b = 0; b < tokens.size(); ++b) result[b].push_back(tokens[b]);
    return true;
  });
  CHECK(calls == count);
  return result;
}

template <class Failure, class Work>
void fails(const Work& work) {
  bool failed = false;
  try {
    work();
  } catch (const Failure& error) {
    failed = error.what()[0] != '\0';
  }
  CHECK(failed);
}

void same_again(const headpool::Model& model) {
  const std::vector<Row> prompts{{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, {5, 4}, {9}};
  headpool::Session session(model, options(3, 120, 5));
  const auto first = texts(session, prompts, 80);  // the static cache grows
  headpool::Session open_ended(model, options(3, 0, 5));
  CHECK(texts(open_ended, prompts, 80) == first);  // that of pattern fused, too
  CHECK(session.lengths()[0] == 12 + 79 && session.lengths()[2] == 1 + 79);
  const bool pair = model.info().encoder_layers > 0;
  const auto go_on = [&] {
    session.rewind(1);
    texts(session, prompts, 9);  // on top
  };
  pair ? fails<headpool::ArgumentError>(go_on) : go_on();
  session.reset();
  CHECK(session.kv_bytes() == 0);
  CHECK(texts(session, prompts, 80) == first);
  if (pair) return fails<headpool::ArgumentError>([&] { session.prefill(Row{1}); });
  texts(session, prompts, 9);  // on top of unequal lengths
  headpool::Session moved = std::move(session);
  moved.rewind(17);
  CHECK(moved.kv_bytes() == 3 * 17 * model.info().kv_bytes_per_token);
}

// What was moved from answers without a crash, and can be assigned to.
void moved_from(const headpool::Model& model) {
  using namespace headpool;
  Model kept = model;
  const Model other = std::move(kept);
  CHECK(&kept.info() == &other.info());
  Session session(kept, options(1, 8)), target = std::move(session);
  CHECK(session.batch() == 0 && session.capacity() == 0 && session.lengths().empty() && session.kv_bytes() == 0);
  const Row prompt{1, 2};
  const std::span<const Token> prompts[] = {prompt};
  fails<ArgumentError>([&] { session.prefill(prompt); });
  fails<ArgumentError>([&] { session.decode(1); });
  fails<ArgumentError>([&] { session.logits(0); });
  fails<ArgumentError>([&] { session.reset(); });
  fails<ArgumentError>([&] { generate(session, prompts, {}, [](auto) { return true; }); });
  session = std::move(target);
  session.prefill(prompt);
  Sampler sampler({}), taken = std::move(sampler);
  fails<ArgumentError>([&] { sampler.pick(session.logits(0)); });
  sampler = std::move(taken);
  sampler.pick(session.logits(0));
}

void logits_of_the_last_call(const headpool::Model& model) {
  using headpool::ArgumentError, headpool::ENDED;
  headpool::Session session(model, options(2, 20));
  const auto none = [&](std::int64_t sequence) { fails<ArgumentError>([&] { session.logits(sequence); }); };
  const Row prompt{3, 4, 5};
  const std::span<const Token> prompts[] = {prompt, prompt};
  none(0), none(2), none(-1);
  const float* all = session.prefill(prompts).data();
  CHECK(session.logits(0).data() == all && session.logits(1).data() == all + model.info().vocab_size);
  session.decode(Row{ENDED, 6});
  none(0), session.logits(1);
  CHECK(session.lengths()[0] == 3 && session.lengths()[1] == 4);
  fails<ArgumentError>([&] { session.decode(Row{ENDED, ENDED}); });
  session.logits(1);  // it fed nothing
  if (model.info().encoder_layers && model.info().cache == "concat") {
    fails<ArgumentError>([&] { session.decode(Row{5, 6}); });  // the first has fallen behind
    CHECK(session.logits(1).data() == all + model.info().vocab_size);
    session.decode(Row{ENDED, 7});
    session.rewind(3);
    session.decode(Row{5, 6});  // in step again
  }
  session.rewind(3);
  none(1);
  session.reset();
  none(0);
}

void mistakes(const headpool::Model& model) {
  using namespace headpool;
  Session session(model, options(1, 8));
  const Token wrong = model.info().vocab_size;
  fails<ArgumentError>([&] { session.prefill(Row{}); });
  fails<ArgumentError>([&] { session.prefill(Row{1, wrong}); });
  fails<ArgumentError>([&] { session.decode(-1); });
  const Row prompt{1};
  const std::span<const Token> prompts[] = {prompt};
  fails<ArgumentError>([&] { generate(session, prompts, {}, nullptr); });
  fails<ArgumentError>([&] { generate(session, prompts, {}, {}); });
  if (model.info().encoder_layers) fails<ArgumentError>([&] { session.decode(1); });
  fails<ArgumentError>([&] { session.decode(Row{1, 2}); });
  fails<CapacityError>([&] { session.prefill(Row(9, 1)); });
  CHECK(session.lengths()[0] == 0);
  session.prefill(Row(8, 1));
  fails<CapacityError>([&] { session.decode(1); });
  fails<ArgumentError>([&] { session.rewind(9); });
  fails<ArgumentError>([&] { session.rewind(-1); });
  fails<ArgumentError>([&] { session.logits(1); });
  fails<ArgumentError>([&] { Session(model, options(0, 8)); });
  fails<ArgumentError>([&] { Session(model, options(1, -8)); });
  fails<ArgumentError>([&] { Session(model, options(1, 8, 0)); });
  fails<ArgumentError>([&] { Session(model, options(65537, 8)); });
  fails<ArgumentError>([&] { Sampler({.temperature = -1, .top_k = 0, .top_p = 1, .seed = 0}); });
  fails<ArgumentError>([&] { Sampler({}, 65537); });
}

// What a caller of the C ABI can do wrong besides.
void mistakes_in_c(const char* bundle, const headpool::ModelOptions& how) {
  hp_model_options opening = HP_INIT(hp_model_options);
  opening.variant = how.variant.c_str(), opening.threads = how.threads, opening.backend = how.backend.c_str();
  hp_session_options sizes = HP_INIT(hp_session_options);
  sizes.capacity = 8;
  hp_model* model = nullptr;
  hp_session* session = nullptr;
  CHECK(hp_model_open(bundle, &opening, &model) == HP_OK && hp_session_create(model, &sizes, &session) == HP_OK);
  hp_model_free(model);  // the session keeps it
  const Token prompt[] = {1, 2};
  const std::int64_t* const prompts[] = {prompt};
  const float* logits = nullptr;
  std::size_t count = std::size_t{1} << 40;  // nothing past the capacity is read
  CHECK(hp_session_prefill(session, prompts, &count, 1, &logits) == HP_CAPACITY);
  count = SIZE_MAX;
  CHECK(hp_session_prefill(session, prompts, &count, 1, &logits) == HP_ARGUMENT && !logits);
  const auto throws = [](void*, const std::int64_t*, std::size_t) -> std::int32_t { throw std::runtime_error("two\nlines"); };
  count = 2;
  CHECK(hp_generate(session, prompts, &count, 1, 3, nullptr, nullptr, 0, throws, nullptr) == HP_INTERNAL);
  CHECK(!std::strcmp(hp_last_error(), "two lines") && hp_session_lengths(session)[0] == 2);
  hp_session_free(session);
}

void many(const headpool::Model& model) {
  for (int i = 0; i < SESSIONS; ++i) {
    headpool::Session session(model, options(1 + i % 2, 100));
    if (i % 10 == 0 && i % 2 == 0) session.prefill(Row{1, 2, 3});
  }
}

void together(const headpool::Model& model) {
  const auto work = [&](std::vector<Row>& out) {
    headpool::Session session(model, options(1, 100));
    out = texts(session, {{3, 1, 4, 1, 5}}, 60);
  };
  std::vector<Row> a, b;
  std::thread one(work, std::ref(a)), other(work, std::ref(b));
  one.join(), other.join();
  CHECK(a == b);
}

// Two threads that open the same variant, each for itself.
void opened_together(const std::string& bundle, const headpool::ModelOptions& how) {
  const auto work = [&](std::vector<Row>& out) {
    for (int i = 0; i < 3; ++i) {
      headpool::Session session(headpool::Model::open(bundle, how), options(1, 100));
      out = texts(session, {{3, 1, 4, 1, 5}}, 20);
    }
  };
  std::vector<Row> a, b;
  std::thread one(work, std::ref(a)), other(work, std::ref(b));
  one.join(), other.join();
  CHECK(a == b);
}

std::vector<headpool::Session> until_exit;  // as a program may hold them in global variables

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2 || argc == 3);
  const std::string backend = argc == 3 ? argv[2] : "";
  for (const headpool::ModelInfo& info : headpool::variants(argv[1])) {
    if (!backend.empty() && info.pattern != "attention" && info.pattern != "grouped") continue;
    // One thread: those of ONNX Runtime, which is not built for it, ThreadSanitizer cannot follow.
    const headpool::ModelOptions how{info.variant, 1, backend};
    const headpool::Model model = headpool::Model::open(argv[1], how);
    CHECK(model.info().variant == info.variant && model.info().kv_bytes_per_token == info.kv_bytes_per_token);
    same_again(model);
    moved_from(model);
    logits_of_the_last_call(model);
    mistakes(model);
    mistakes_in_c(argv[1], how);
    many(model);
    together(model);
    opened_together(argv[1], how);
    for (int i = 0; i < MODELS; ++i) headpool::Session(headpool::Model::open(argv[1], how)).prefill(Row{1});
    until_exit.emplace_back(model, options(1, 8)).prefill(Row{1});
    std::printf("%s is sound\n", info.variant.c_str());
  }
  fails<headpool::ArgumentError>([&] { headpool::Model::open(argv[1], {"another", 1}); });
  fails<headpool::ArgumentError>([&] { headpool::Model::open(argv[1], {"", 1025}); });
  fails<headpool::BundleError>([&] { headpool::Model::open(argv[0]); });
  alarm(60);  // an exit that takes longer is none
}
