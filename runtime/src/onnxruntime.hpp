// ONNX Runtime's C++ interface, started by hand as in ops/ort.hpp, which one program must agree on.
#pragma once

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace headpool::detail {

// Before anything of Ort is used. Throws BackendError where the library is older than its headers.
void start_onnxruntime();

}  // namespace headpool::detail
