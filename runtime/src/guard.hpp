// Whatever a library underneath throws, as errors of ours in one line.
#pragma once

#include <exception>
#include <headpool/error.hpp>
#include <new>
#include <string>
#include <string_view>

namespace headpool::detail {

// Of an exception or a name, one line of at most 400 characters, in ASCII.
std::string one_line(const std::string& text);

// Whether `message`, of ONNX Runtime, which has no code for it, says that memory was lacking.
bool lacks_memory(std::string_view message);

// What `work` returns. Lack of memory becomes MemoryError, other exceptions BackendError, with `doing` before them.
template <class Work>
auto guarded(std::string_view doing, const Work& work) {
  try {
    return work();
  } catch (const Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw MemoryError(one_line(std::string(doing) + ": not enough memory"));
  } catch (const std::exception& error) {
    if (lacks_memory(error.what())) throw MemoryError(one_line(std::string(doing) + ": not enough memory"));
    throw BackendError(one_line(std::string(doing) + ": " + error.what()));
  }
}

}  // namespace headpool::detail
