// What goes wrong, as exceptions of one family. Every message is one line: what was wrong, the value, and what to do.
#pragma once

#include <headpool/api.h>

#if __cplusplus < 202002L
#error "headpool's C++ headers need C++20: compile with -std=c++20 (headpool/headpool.h is for C and older C++)"
#endif

#include <stdexcept>
#include <string>

namespace headpool {

// The numbers are those of headpool.h.
enum class ErrorCode {
  argument = 1,  // the caller's: a token outside the vocabulary, a wrong number of prompts, a temperature below 0
  bundle = 2,    // the bundle is missing, damaged, of another schema, or points outside its folder
  capacity = 3,  // the cache is full, or would be
  backend = 4,   // it is not in this library, has no GPU, cannot load the graph or the engine, or failed in a step
  memory = 5,    // not enough of it; where ONNX Runtime has none to start its threads, it or the C library may end the process
  internal = 6,  // anything else
};

class HEADPOOL_API Error : public std::runtime_error {
 public:
  // Control characters, which a name of a file may have, become spaces.
  Error(ErrorCode code, const std::string& message);
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

template <ErrorCode C>
class HEADPOOL_API ErrorOf : public Error {
 public:
  explicit ErrorOf(const std::string& message) : Error(C, message) {}
};

using ArgumentError = ErrorOf<ErrorCode::argument>;
using BundleError = ErrorOf<ErrorCode::bundle>;
using CapacityError = ErrorOf<ErrorCode::capacity>;
using BackendError = ErrorOf<ErrorCode::backend>;
using MemoryError = ErrorOf<ErrorCode::memory>;

}  // namespace headpool
