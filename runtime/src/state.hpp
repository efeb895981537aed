// What a model holds, whatever runs it.
#pragma once

#include <headpool/model.hpp>

#include "manifest.hpp"
#include "runner.hpp"

namespace headpool {

struct Model::State {
  State(detail::Variant v, BackendInfo b, int t) : variant(std::move(v)), backend(std::move(b)), threads(t) {}
  virtual ~State() = default;

  // The most tokens that each of `batch` sequences can hold. Throws ArgumentError where there can be no such session.
  virtual std::int64_t most_tokens(std::int64_t batch) const = 0;

  // What a session of these sizes runs on. The model outlives it.
  virtual std::unique_ptr<detail::Runner> runner(const detail::Sizes& sizes) const = 0;

  const detail::Variant variant;
  const BackendInfo backend;
  const int threads;
};

namespace detail {

// Loads `variant`. They throw BundleError, BackendError, MemoryError.
std::shared_ptr<const Model::State> open_onnxruntime(const std::filesystem::path& bundle, Variant variant, int threads,
                                                     bool cuda);
std::shared_ptr<const Model::State> open_tensorrt(const std::filesystem::path& bundle, Variant variant,
                                                  const std::string& backend);

}  // namespace detail
}  // namespace headpool
