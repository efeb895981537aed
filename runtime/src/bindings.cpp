#include "bindings.hpp"

#include <iterator>
#include <set>

namespace headpool::detail {
namespace {

struct Binding {
  std::string name, dtype, role, alias;
  std::int64_t layer;
  const Json& shape;
};

Binding binding(const Json& data) {
  Binding result{text(data, "name"), text(data, "dtype"), text(data, "role"), {}, -1, array(data, "shape")};
  if (result.name.empty()) flaw("a binding has no name");
  if (data.contains("alias")) result.alias = text(data, "alias");
  if (result.role == "cache") result.layer = number(at(data, "layer"), "layer", 0, MOST);
  return result;
}

void expect_shape(const Binding& b, const std::string& dtype, const Json& shape) {
  if (b.dtype != dtype || b.shape != shape)
    flaw("binding " + shown(b.name) + " is " + shown(b.dtype) + " " + shown(b.shape) + ", not " + dtype + " " + shown(shape));
}

// [batch, heads, rows, size]
void expect_cache(const Binding& b, const std::string& dtype, const char* rows) {
  if (b.shape.size() != 4) flaw("cache " + shown(b.name) + " has the shape " + shown(b.shape));
  number(b.shape[1], "a cache's number of heads", 1, MOST);
  number(b.shape[3], "a cache's head size", 1, MOST);
  expect_shape(b, dtype, {"batch", b.shape[1], rows, b.shape[3]});
}

const std::string& cache_dtype(const Variant& variant) {
  return variant.info.cache_dtype.empty() ? variant.info.dtype : variant.info.cache_dtype;
}

void set_once(std::string& target, const std::string& name, const char* role) {
  if (!target.empty()) flaw(std::string("it has two inputs or outputs for ") + role);
  target = name;
}

// The layers of the caches that were read.
struct Layers {
  std::vector<std::int64_t> own, cross;
};

Layers read_inputs(const Json& inputs, Variant& variant) {
  Layers layers;
  Encoder* encoder = variant.encoder ? &*variant.encoder : nullptr;
  for (const Json& item : inputs) {
    const Binding b = binding(item);
    if (b.role == "tokens" || b.role == "positions") {
      set_once(b.role == "tokens" ? variant.tokens : variant.positions, b.name, b.role.c_str());
      expect_shape(b, "int64", {"batch", "sequence"});
    } else if (b.role == "mask" && (encoder || !variant.in_place)) {
      set_once(encoder ? encoder->decoder_mask : variant.mask, b.name, "mask");
      expect_shape(b, "int64", {"batch", encoder ? "encoder" : "total"});
    } else if (b.role == "cache") {
      const bool cross = encoder && b.shape.size() == 4 && b.shape[2] == "encoder";
      expect_cache(b, cache_dtype(variant), cross ? "encoder" : variant.in_place ? "capacity" : "past");
      const auto& heads = variant.info.kv_heads;
      if (b.layer < 0 || b.layer >= std::ssize(heads) || b.shape[1] != heads[static_cast<std::size_t>(b.layer)])
        flaw("input " + shown(b.name) + " has other KV heads than its config says");
      const CacheBinding cache{
          b.name, {}, b.shape[1].get<std::int64_t>(), b.shape[3].get<std::int64_t>(), data_type(cache_dtype(variant))};
      (cross ? encoder->caches : variant.caches).push_back(cache);
      (cross ? layers.cross : layers.own).push_back(b.layer);
    } else {
      flaw("input " + shown(b.name) + " has the role " + shown(b.role));
    }
  }
  const bool positions = variant.in_place || !encoder, mask = !variant.in_place && !encoder;
  if (variant.tokens.empty() || variant.positions.empty() == positions || variant.mask.empty() == mask ||
      variant.caches.empty() || (encoder && (encoder->decoder_mask.empty() || encoder->caches.empty())))
    flaw("variant " + shown(variant.info.variant) + " lacks an input, or has one too many");
  return layers;
}

// The next output of `caches`, which have those layers, is `b`.
void set_present(const Binding& b, std::vector<CacheBinding>& caches, const std::vector<std::int64_t>& layers,
                 std::size_t& next, bool alias) {
  if (next == caches.size()) flaw("it has more caches as outputs than as inputs");
  CacheBinding& cache = caches[next];
  if (b.layer != layers[next] || b.shape[1] != cache.heads || b.shape[3] != cache.size || b.alias != (alias ? cache.past : ""))
    flaw("output " + shown(b.name) + " does not belong to input " + shown(cache.past));
  cache.present = b.name;
  ++next;
}

void read_outputs(const Json& outputs, Variant& variant, const std::vector<std::int64_t>& layers) {
  std::size_t next = 0;
  for (const Json& item : outputs) {
    const Binding b = binding(item);
    if (b.role == "logits") {
      set_once(variant.logits, b.name, "logits");
      const Json rows = variant.all_logits ? Json("sequence") : Json(1);
      expect_shape(b, variant.info.dtype, {"batch", rows, variant.info.vocab_size});
    } else if (b.role == "cache") {
      expect_cache(b, cache_dtype(variant), variant.in_place ? "capacity" : "total");
      set_present(b, variant.caches, layers, next, variant.in_place);
    } else {
      flaw("output " + shown(b.name) + " has the role " + shown(b.role));
    }
  }
  if (variant.logits.empty() || next != variant.caches.size()) flaw("an output is missing");
}

void read_encoder(const Json& data, const std::string& dtype, Encoder& encoder, const std::vector<std::int64_t>& layers) {
  for (const Json& item : array(data, "encoder_inputs")) {
    const Binding b = binding(item);
    if (b.role != "tokens" && b.role != "mask")
      flaw("input " + shown(b.name) + " of the encoder has the role " + shown(b.role));
    set_once(b.role == "tokens" ? encoder.tokens : encoder.mask, b.name, b.role.c_str());
    expect_shape(b, "int64", {"batch", "encoder"});
  }
  std::size_t next = 0;
  for (const Json& item : array(data, "encoder_outputs")) {
    const Binding b = binding(item);
    if (b.role == "hidden") {
      set_once(encoder.hidden, b.name, "hidden");
      expect_shape(b, dtype, {"batch", "encoder", encoder.hidden_size});
    } else if (b.role == "cache") {
      expect_cache(b, dtype, "encoder");
      set_present(b, encoder.caches, layers, next, false);
    } else {
      flaw("output " + shown(b.name) + " of the encoder has the role " + shown(b.role));
    }
  }
  if (encoder.tokens.empty() || encoder.mask.empty() || encoder.hidden.empty() || next != encoder.caches.size())
    flaw("an input or an output of the encoder is missing");
}

// The names of a graph's inputs or outputs: those given that are not empty, and one of each cache.
class Names {
 public:
  explicit Names(std::initializer_list<std::string> names) {
    for (const std::string& name : names)
      if (!name.empty()) add(name);
  }
  Names& with(const std::vector<CacheBinding>& caches, std::string CacheBinding::* name) {
    for (const CacheBinding& cache : caches) add(cache.*name);
    return *this;
  }

 private:
  void add(const std::string& name) {
    if (!names_.insert(name).second) flaw("two inputs or two outputs of a graph have one name, " + shown(name));
  }
  std::set<std::string> names_;
};

void check_names(const Variant& v) {
  constexpr auto past = &CacheBinding::past, present = &CacheBinding::present;
  Names inputs{v.tokens, v.positions, v.mask, v.encoder ? v.encoder->decoder_mask : ""};
  inputs.with(v.caches, past);
  Names{v.logits}.with(v.caches, present);
  if (!v.encoder) return;
  inputs.with(v.encoder->caches, past);
  Names{v.encoder->tokens, v.encoder->mask};
  Names{v.encoder->hidden}.with(v.encoder->caches, present);
}

}  // namespace

void read_bindings(const Json& data, Variant& variant) {
  const Layers layers = read_inputs(array(data, "inputs"), variant);
  read_outputs(array(data, "outputs"), variant, layers.own);
  if (variant.encoder) read_encoder(data, variant.info.dtype, *variant.encoder, layers.cross);
  check_names(variant);
}

}  // namespace headpool::detail
