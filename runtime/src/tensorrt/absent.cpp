// In place of sdk.cpp where the SDK was not found, or is not wanted.
#include <headpool/error.hpp>

#include "gpu.hpp"

namespace headpool::detail {

std::shared_ptr<const Gpu> tensorrt(const std::string& backend) {
  throw BackendError("backend " + backend +
                     " is not in this libheadpool, which was built without TensorRT's SDK; build it with " +
                     "cmake -DHEADPOOL_TENSORRT=" + backend + " -DTensorRT_ROOT=…, or take onnxruntime");
}

}  // namespace headpool::detail
