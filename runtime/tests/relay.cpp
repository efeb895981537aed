// The relay with threads of its own: every unit once, stages in order, and what is thrown ends it.
#include "../ops/relay.hpp"

#include <cstdio>
#include <random>
#include <stdexcept>

namespace {

using headpool::Relay;

long failures = 0;

void expect(bool holds, const char* what) {
  if (!holds && ++failures <= 20) std::printf("FAILED %s\n", what);
}

struct Work {
  std::vector<std::vector<int>> runs;  // of each unit of each stage: not atomic, for the thread sanitizer to look at
  size_t throws_at;                    // a stage
  using State = size_t;

  State enter(size_t stage) {
    if (stage)
      for (const int count : runs[stage - 1]) expect(count == 1, "a stage begins when the one before is done");
    return stage + 1;
  }

  void run(size_t stage, size_t first, size_t end, State state) {
    expect(state == stage + 1, "a thread has entered the stage it works on");
    expect(first < end && end <= runs[stage].size(), "a part is within its stage");
    if (stage == throws_at) throw std::runtime_error("thrown");
    for (size_t i = first; i < end; ++i) ++runs[stage][i];
  }

  bool ahead(size_t stage, size_t first, size_t turn) {
    expect(first < runs[stage].size(), "a part is within its stage");
    return turn < 3;
  }
};

void test(std::mt19937& random, bool fails) {
  const auto pick = [&](size_t from, size_t to) { return std::uniform_int_distribution<size_t>(from, to)(random); };
  Work work{{}, 0};
  std::vector<size_t> ends;
  for (size_t stages = pick(1, 6); stages; --stages) {
    work.runs.emplace_back(pick(1, 40), 0);
    ends.push_back((ends.empty() ? 0 : ends.back()) + work.runs.back().size());
  }
  work.throws_at = fails ? pick(0, ends.size() - 1) : ends.size();
  const size_t count = pick(1, 6);
  Relay<Work> relay(ends, pick(1, 8), work);
  std::atomic<size_t> thrown{0};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < count; ++i)
    threads.emplace_back([&] {
      try {
        relay.work();
      } catch (const std::runtime_error&) {
        ++thrown;
      }
    });
  for (auto& thread : threads) thread.join();
  expect(fails == (thrown > 0), "what a thread throws comes out");
  expect(relay.workers() <= count, "no more workers than threads");
  if (fails) return;
  for (const auto& stage : work.runs)
    for (const int runs : stage) expect(runs == 1, "every unit runs once");
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) test(random, i % 4 == 3);
  std::printf("%ld failures\n", failures);
  return failures != 0;
}
