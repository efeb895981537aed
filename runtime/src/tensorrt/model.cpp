#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "../guard.hpp"
#include "../memory.hpp"
#include "../state.hpp"
#include "runner.hpp"
#include "sha256.hpp"

namespace headpool::detail {
namespace {

using Records = std::vector<EngineRecord>;

// Those that fit. Throws Failure where there are none: `complaint`, with what there is in place of its "…".
template <class Failure, class Fits, class What>
Records narrowed(const Records& records, const Fits& fits, const What& what, std::string complaint) {
  Records fitting;
  std::copy_if(records.begin(), records.end(), std::back_inserter(fitting), fits);
  if (!fitting.empty()) return fitting;
  std::string there;
  std::set<std::string> named;
  for (const EngineRecord& record : records) {
    const std::string one = what(record);
    if (named.insert(one).second) there += (there.empty() ? "" : ", ") + one;
  }
  const std::string dots = "…";
  throw Failure(one_line(complaint.replace(complaint.find(dots), dots.size(), there)));
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : "+") + word;
  return text;
}

// A variant's engines, each deserialised when the first session needs it.
class TensorRTModel final : public Model::State {
 public:
  TensorRTModel(Variant v, BackendInfo backend, std::shared_ptr<const Gpu> gpu, Records records, std::string command)
      : State(std::move(v), std::move(backend), 0),
        gpu_(std::move(gpu)),
        records_(std::move(records)),
        command_(std::move(command)) {}

  std::int64_t most_tokens(std::int64_t batch) const override {
    std::int64_t most = 0;
    for (const EngineRecord& record : of_batch(batch)) most = std::max(most, record.capacity);
    return std::min(most, variant.info.max_positions);
  }

  std::unique_ptr<Runner> runner(const Sizes& sizes) const override {
    const auto fits = [&](const EngineRecord& r) { return r.capacity >= sizes.capacity; };
    const auto what = [](const EngineRecord& r) { return std::to_string(r.capacity); };
    const std::string wanted = std::to_string(sizes.capacity);
    const Records fitting = narrowed<ArgumentError>(
        of_batch(sizes.batch), fits, what,
        prefix() + "for … tokens a sequence, this session wants " + wanted + "; " + command_ + " --capacity " + wanted);
    const EngineRecord& record =  // plain weights, and then the smallest
        *std::min_element(fitting.begin(), fitting.end(), [](const EngineRecord& a, const EngineRecord& b) {
          return std::pair(!a.quantize.empty(), a.capacity) < std::pair(!b.quantize.empty(), b.capacity);
        });
    return tensorrt_runner(variant, record, engine(record), sizes.capacity, sizes.chunk);
  }

 private:
  std::string prefix() const { return "variant " + variant.info.variant + " has engines "; }

  Records of_batch(std::int64_t batch) const {
    const std::string wanted = std::to_string(batch);
    return narrowed<ArgumentError>(
        records_, [&](const EngineRecord& r) { return r.batch == batch; },
        [](const EngineRecord& r) { return std::to_string(r.batch); },
        prefix() + "for batch …, this session has " + wanted + "; " + command_ + " --batch " + wanted);
  }

  std::shared_ptr<const Engine> engine(const EngineRecord& record) const {
    const std::filesystem::path path = file_in(record.folder, record.file, "build it again");
    const std::lock_guard lock(mutex_);
    std::shared_ptr<const Engine>& engine = engines_[path];
    if (!engine) engine = load(record, path);
    return engine;
  }

  std::shared_ptr<const Engine> load(const EngineRecord& record, const std::filesystem::path& path) const {
    const std::uintmax_t size = std::filesystem::file_size(path);
    if (size != record.bytes)
      throw BundleError(path.string() + " has " + std::to_string(size) + " bytes, " + std::to_string(record.bytes) +
                        " were built; it is damaged, build it again");
    const std::shared_ptr<const Memory> plan = shared_file(path);
    const std::span<const std::byte> bytes(plan->data(), plan->size());
    const std::string found = sha256(bytes);
    if (found != record.sha256)
      throw BundleError(path.string() + " has the SHA-256 " + found.substr(0, 12) + ", " +
                        one_line(record.sha256).substr(0, 12) + " was built; it is damaged, build it again");
    auto engine = guarded(path.string() + " does not load", [&] { return gpu_->load(bytes, record.later_versions); });
    expect_tensors(engine->tensors(), variant, record, path.string());
    return engine;
  }

  const std::shared_ptr<const Gpu> gpu_;
  const Records records_;
  const std::string command_;
  mutable std::mutex mutex_;
  mutable std::map<std::filesystem::path, std::shared_ptr<const Engine>> engines_;
};

}  // namespace

std::shared_ptr<const Model::State> open_tensorrt(const std::filesystem::path& bundle, Variant variant,
                                                  const std::string& backend) {
  const std::shared_ptr<const Gpu> gpu = tensorrt(backend);
  const std::string& name = variant.info.variant;
  const std::string command = "headpool build " + bundle.string() + " --backend " + backend + " --variant " + name;
  const std::string prefix = "variant " + name + " has " + backend + " engines ";
  Records records = engines_of(std::filesystem::absolute(bundle));  // read later, maybe from another working directory
  std::erase_if(records, [&](const EngineRecord& r) { return r.variant != name || r.backend != backend; });
  if (records.empty())
    throw BackendError(
        one_line(bundle.string() + " has no " + backend + " engine of variant " + name + "; make one: " + command));
  const std::string version = gpu->version();
  records = narrowed<BackendError>(
      records, [&](const EngineRecord& r) { return r.loads_in(version); }, [](const EngineRecord& r) { return r.version; },
      prefix + "built by …, here is " + version + "; " + command);
  records = narrowed<BackendError>(
      records, [](const EngineRecord& r) { return !r.stripped; }, [](const EngineRecord&) { return "--strip"; },
      prefix + "built with …, and only headpool run gives those their weights; build one without");
  const std::string chip = gpu->chip();
  records = narrowed<BackendError>(
      records, [&](const EngineRecord& r) { return r.runs_on(chip); }, [](const EngineRecord& r) { return joined(r.targets); },
      prefix + "for …, this GPU is " + chip + "; " + command + " --target here");
  for (const EngineRecord& record : records)
    expect_tensors(record.tensors, variant, record, (record.folder / "engine.json").string());
  std::string library = backend;
  std::ranges::replace(library, '-', '_');
  BackendInfo info{backend, gpu->name() + " (" + chip + ")", library, version};
  return std::make_shared<TensorRTModel>(std::move(variant), std::move(info), gpu, std::move(records), command);
}

}  // namespace headpool::detail
