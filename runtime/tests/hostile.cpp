// Graphs that mean harm, each in a process of its own: hostile BUNDLE VARIANT GRAPH FILE…
//
// Every FILE in turn takes the place of the bundle's GRAPH and is opened, fed prompts and stepped. It may be refused or answer
// anything; a process that dies of a signal, hangs, or is stopped by a sanitizer is a failure, and its FILE is named.
// tests/runtime/hostile_graphs.py makes such files.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <headpool/session.hpp>
#include <map>
#include <vector>

namespace {

using headpool::Token;

constexpr unsigned SECONDS = 60;  // of one process, on a busy machine too
constexpr int ANSWERED = 0, REFUSED = 10;

// What a process may take, so that no graph takes the machine's memory. A sanitizer takes far more for itself.
void limit() {
  rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);
#ifndef HEADPOOL_SANITIZED
  constexpr rlim_t MOST = rlim_t{4} << 30;
  rlimit memory{MOST, MOST};
  setrlimit(RLIMIT_AS, &memory);
#endif
  alarm(SECONDS);
}

// Many rows at once, few, and one a sequence.
void use(const std::string& bundle, const std::string& variant) {
  headpool::Session session(headpool::Model::open(bundle, {variant, 2}), {.batch = 2, .capacity = 64, .chunk = 32});
  const std::vector<Token> longer(29, 3), shorter{5, 7}, next{1, 2};
  const std::span<const Token> unequal[] = {longer, shorter}, few[] = {shorter, shorter};
  session.prefill(unequal);
  session.decode(next);
  session.reset();
  session.prefill(few);
}

[[noreturn]] void child(const std::string& bundle, const std::string& variant) {
  limit();
  try {
    use(bundle, variant);
  } catch (const headpool::Error& error) {
    const std::string_view line = error.what();
    _exit(line.empty() || line.find('\n') != line.npos ? 1 : REFUSED);
  }
  _exit(ANSWERED);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  const std::string bundle = argv[1], variant = argv[2];
  std::map<int, int> ends;
  int failures = 0;
  for (int i = 4; i < argc; ++i) {
    std::filesystem::copy_file(argv[i], std::filesystem::path(bundle) / argv[3],
                               std::filesystem::copy_options::overwrite_existing);
    std::fflush(nullptr);
    const pid_t process = fork();
    if (process == 0) child(bundle, variant);
    int status = 0;
    if (process < 0 || waitpid(process, &status, 0) != process) return 3;
    const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    ++ends[code];
    if (code == ANSWERED || code == REFUSED) continue;
    ++failures;
    std::printf("%s: %s %d\n", argv[i], code < 0 ? "signal" : "exit code", code < 0 ? -code : code);
  }
  std::printf("%d answered, %d refused, %d failed\n", ends[ANSWERED], ends[REFUSED], failures);
  return failures ? 1 : 0;
}
