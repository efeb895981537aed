#include <headpool/model.hpp>

#include "cores.hpp"
#include "guard.hpp"
#include "onnxruntime.hpp"
#include "state.hpp"

namespace headpool {
namespace {

using detail::Variant;

constexpr int MOST_THREADS = 1024;

Variant choose(std::vector<Variant> variants, const std::string& name) {
  if (name.empty()) return std::move(variants.front());
  std::string names;
  for (Variant& variant : variants) {
    if (variant.info.variant == name) return std::move(variant);
    names += (names.empty() ? "" : ", ") + variant.info.variant;
  }
  throw ArgumentError(detail::one_line("variant " + name + " is unknown; choose from " + names));
}

}  // namespace

int default_threads() { return detail::physical_cores(); }

std::vector<ModelInfo> variants(const std::filesystem::path& bundle) {
  return detail::guarded("headpool.json cannot be read", [&] {
    std::vector<ModelInfo> infos;
    for (Variant& variant : detail::read_manifest(bundle)) infos.push_back(std::move(variant.info));
    return infos;
  });
}

Model Model::open(const std::filesystem::path& bundle, const ModelOptions& options) {
  if (options.threads < 0 || options.threads > MOST_THREADS)
    throw ArgumentError("threads " + std::to_string(options.threads) + " is not a whole number from 0 (default_threads()) to " +
                        std::to_string(MOST_THREADS));
  const std::string& backend = options.backend;
  const bool tensorrt = backend == "tensorrt" || backend == "tensorrt-rtx";
  if (!tensorrt && !backend.empty() && backend != "onnxruntime" && backend != "onnxruntime-cuda")
    throw ArgumentError(detail::one_line("backend " + backend +
                                         " is unknown; choose from onnxruntime, onnxruntime-cuda, tensorrt, tensorrt-rtx"));
  return detail::guarded("the model cannot be opened", [&] {
    Variant variant = choose(detail::read_manifest(bundle), options.variant);
    if (tensorrt && variant.encoder)
      throw BackendError(detail::one_line("variant " + variant.info.variant + " is an encoder-decoder, and backend " + backend +
                                          " runs decoder-only models; take onnxruntime"));
    return Model(tensorrt
                     ? detail::open_tensorrt(bundle, std::move(variant), backend)
                     : detail::open_onnxruntime(bundle, std::move(variant), options.threads, backend == "onnxruntime-cuda"));
  });
}

const ModelInfo& Model::info() const noexcept { return state_->variant.info; }
int Model::threads() const noexcept { return state_->threads; }
const BackendInfo& Model::backend() const noexcept { return state_->backend; }

std::string onnxruntime_version() {
  detail::start_onnxruntime();
  return OrtGetApiBase()->GetVersionString();
}

}  // namespace headpool
