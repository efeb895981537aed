// ONNX Runtime's C++ interface, started by hand as in ops/ort.hpp, which one program must agree on.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <headpool/error.hpp>
#include <new>
#include <string>
#include <string_view>

namespace headpool::detail {

// Of an exception or a name, one line of at most 400 characters, in ASCII.
std::string one_line(const std::string& text);

// What `work` returns; ONNX Runtime's exceptions become BackendError with `doing` before them, lack of memory MemoryError.
template <class Work>
auto guarded(std::string_view doing, const Work& work) {
  try {
    return work();
  } catch (const Ort::Exception& error) {
    throw BackendError(one_line(std::string(doing) + ": " + error.what()));
  } catch (const std::bad_alloc&) {
    throw MemoryError(one_line(std::string(doing) + ": not enough memory"));
  }
}

// Before anything of Ort is used. Throws BackendError where the library is older than its headers.
void start_onnxruntime();

}  // namespace headpool::detail
