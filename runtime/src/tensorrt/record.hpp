// engine.json: which engines a bundle has. exporter/engines/tensorrt/record.py is what writes it.
#pragma once

#include "../manifest.hpp"
#include "gpu.hpp"

namespace headpool::detail {

// One engine: what of its record a session needs to know.
struct EngineRecord {
  std::filesystem::path folder;  // where it lies
  std::string variant, file, sha256;
  std::uint64_t bytes;
  std::string backend, version;
  std::vector<std::string> targets;       // chips: sm86, …
  bool later_versions, later_chips;       // whether it was built with --compatible version, hardware
  std::int64_t batch, capacity, prefill;  // sequences, tokens of each, most tokens of each in one call
  bool stripped;                          // of its weights
  std::string quantize;                   // empty: weights as exported
  std::vector<EngineTensor> tensors;

  // Whether TensorRT `here` reads the plan: the one that built it, or any later one where it was built so.
  bool loads_in(const std::string& here) const;

  // Whether that GPU ("sm89") runs the plan: one it was built for, or Ampere and all later where it was built so.
  bool runs_on(const std::string& chip) const;
};

// Of the text of an engine.json. Throws Flaw (fields.hpp).
std::vector<EngineRecord> parse_engines(std::string_view text);

// All engines of a bundle, in order of their folders' names. Throws BundleError.
std::vector<EngineRecord> engines_of(const std::filesystem::path& bundle);

// Throws BundleError, after `whose` tensors they are, where `found` are not those of `variant` in an engine of these sizes.
void expect_tensors(const std::vector<EngineTensor>& found, const Variant& variant, const EngineRecord& sizes,
                    const std::string& whose);

}  // namespace headpool::detail
