// Counts the time inside ONNX Runtime's Run of a binding, and the inputs that are bound, whoever calls it: what this process
// takes as ONNX Runtime's table of functions is a copy of it with those wrapped.
#pragma once

#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <chrono>

namespace inside_run {

inline std::chrono::nanoseconds spent{0};  // by one thread at a time
inline long bound = 0;                     // likewise
inline const OrtApiBase* real = nullptr;
inline decltype(OrtApi::RunWithBinding) run = nullptr;
inline decltype(OrtApi::BindInput) bind_input = nullptr;

inline OrtStatus* ORT_API_CALL timed(OrtSession* session, const OrtRunOptions* options, const OrtIoBinding* binding) noexcept {
  const auto start = std::chrono::steady_clock::now();
  OrtStatus* const status = run(session, options, binding);
  spent += std::chrono::steady_clock::now() - start;
  return status;
}

inline OrtStatus* ORT_API_CALL counted(OrtIoBinding* binding, const char* name, const OrtValue* value) noexcept {
  ++bound;
  return bind_input(binding, name, value);
}

inline const OrtApi* ORT_API_CALL table(std::uint32_t version) noexcept {
  const OrtApi* const found = real->GetApi(version);
  if (!found || version > ORT_API_VERSION) return found;  // of the library's own code, newer than this header
  static const OrtApi copy = [&] {
    OrtApi all = *found;
    run = all.RunWithBinding;
    all.RunWithBinding = timed;
    bind_input = all.BindInput;
    all.BindInput = counted;
    return all;
  }();
  return &copy;
}

}  // namespace inside_run

extern "C" [[gnu::visibility("default")]] const OrtApiBase* ORT_API_CALL OrtGetApiBase() noexcept {
  static const OrtApiBase base = [] {
    inside_run::real = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(RTLD_NEXT, "OrtGetApiBase"))();
    return OrtApiBase{inside_run::table, inside_run::real->GetVersionString};
  }();
  return &base;
}
