#pragma once

#include "../runner.hpp"
#include "record.hpp"

namespace headpool::detail {

// A session on `engine`, whose tensors are those of `variant` with the sizes of `record`: of its batch, of at most its
// capacity, in calls of at most its prefill. Throws MemoryError, BackendError.
std::unique_ptr<Runner> tensorrt_runner(const Variant& variant, const EngineRecord& record,
                                        const std::shared_ptr<const Engine>& engine, std::int64_t capacity, std::int64_t chunk);

}  // namespace headpool::detail
