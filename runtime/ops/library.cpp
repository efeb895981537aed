// headpool's operators as an ONNX Runtime custom-operator library: domain "headpool", fp32 (caches also fp16 and int8), CPU.
//
//   FusedAttention  RoPE, cache update in place and grouped-query attention: reads the cache's used rows once a group
//   LinearChain     linear layers one after another, each x · wᵀ (+ bias, + residual) or gated, with RMSNorm before
#include <mutex>

#include "ort.hpp"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) return base->GetApi(1)->CreateStatus(ORT_FAIL, "headpool's operators need a newer ONNX Runtime");
  static OrtCustomOpDomain* domain = nullptr;
  static std::mutex mutex;  // sessions may be opened in several threads
  const std::lock_guard lock(mutex);
#ifndef RegisterCustomOps  // part of libheadpool it has another name, and what InitApi sets is set: other threads may be
                           // reading it
  if (!domain) Ort::InitApi(api);
#endif
  OrtStatus* status = nullptr;
  if (!domain) {
    status = api->CreateCustomOpDomain("headpool", &domain);
    if (!status) status = api->CustomOpDomain_Add(domain, headpool::chain_operator());
    for (const OrtCustomOp* op : headpool::attention_operators())
      if (!status) status = api->CustomOpDomain_Add(domain, op);
  }
  return status ? status : api->AddCustomOpDomain(options, domain);
}
