// Stages of work in one parallel region, each begun when the whole of the one before is done.
//
// A region of its own for each would cost its start and end, and at its end all threads but one would stand idle. Here a
// thread that must wait already knows its next task and asks memory for what that will read.
#pragma once

#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

namespace headpool {

// Work has
//   State                                  what a thread keeps while it works on a stage
//   State enter(stage)                     called once a thread and stage, when the stage before is done
//   void run(stage, first, end, State)     units [first, end)
//   bool ahead(stage, first, turn)         ask memory for a part of what these units will read; false when that is done
// all called by many threads at once.
template <class Work>
class Relay {
 public:
  // ends[i]: the number of units in the stages up to and including i, the pieces that a stage can be divided into.
  // threads: how many are likely to work.
  Relay(const std::vector<size_t>& ends, size_t threads, Work& work) : ends_(ends), threads_(threads), work_(work) {}

  // To be called by any number of threads, one after another too: units are handed out in order, so that whoever waits,
  // waits for units that others are already at. What a thread throws ends the work of all.
  void work() {
    try {
      run();
    } catch (...) {
      failed_.store(true, std::memory_order_relaxed);
      throw;
    }
  }

  size_t workers() const { return workers_.load(std::memory_order_relaxed); }  // the threads that found something to do

 private:
  struct Part {
    size_t stage = 0, first, end;  // units of all stages
  };

  void run() {
    size_t entered = ends_.size();
    typename Work::State state{};
    for (Part part; claim(part);) {
      const size_t before = part.stage ? ends_[part.stage - 1] : 0, first = part.first - before, end = part.end - before;
      if (!await(before, part.stage, first)) return;
      if (entered == ends_.size()) workers_.fetch_add(1, std::memory_order_relaxed);
      if (part.stage != entered) state = work_.enter(entered = part.stage);
      work_.run(part.stage, first, end, state);
      done_.fetch_add(end - first, std::memory_order_release);
    }
  }

  // Large parts first, as memory is read fastest in long streams, and ever smaller ones, so that all threads end together.
  bool claim(Part& part) {
    part.first = next_.load(std::memory_order_relaxed);
    do {
      if (part.first >= ends_.back()) return false;
      while (part.first >= ends_[part.stage]) ++part.stage;
      part.end = part.first + (ends_[part.stage] - part.first + threads_ - 1) / threads_;
    } while (!next_.compare_exchange_weak(part.first, part.end, std::memory_order_relaxed));
    return true;
  }

  // No unit of this stage starts before `count` units are done, so that these are all of the stages before.
  bool await(size_t count, size_t stage, size_t first) {
    for (size_t turn = 0; done_.load(std::memory_order_acquire) < count; ++turn) {
      if (failed_.load(std::memory_order_relaxed)) return false;
      if (!work_.ahead(stage, first, turn)) pause(turn);
    }
    return true;
  }

  static void pause(size_t turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (turn > PATIENCE) std::this_thread::yield();  // the processor may be needed by the very thread waited for
  }

  static constexpr size_t PATIENCE = 2000;
  const std::vector<size_t>& ends_;
  const size_t threads_;
  Work& work_;
  std::atomic<bool> failed_{false};
  std::atomic<size_t> workers_{0};
  alignas(64) std::atomic<size_t> next_{0};
  alignas(64) std::atomic<size_t> done_{0};
};

}  // namespace headpool
