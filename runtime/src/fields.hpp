// JSON of unknown origin, read a field at a time: each function throws Flaw, in one line of ASCII, where it is not as due.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>

namespace headpool::detail {

using Json = nlohmann::json;

constexpr std::int64_t MOST = (std::int64_t{1} << 31) - 1;  // of a size

struct Flaw : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void flaw(const std::string& what) { throw Flaw(what); }

// The whole of a text, which is not nested deeply.
Json parse_json(std::string_view text);

// Of what a file holds, as much as fits in a message.
std::string shown(const Json& value);

const Json& at(const Json& object, const char* key);
std::string text(const Json& object, const char* key);
std::string one_of(const Json& object, const char* key, std::initializer_list<const char*> choices);
const Json& array(const Json& object, const char* key);

// A whole number from `least` to `most`.
std::int64_t number(const Json& value, const char* what, std::int64_t least, std::int64_t most);
std::int64_t size_in(const Json& object, const char* key);  // from 1 to MOST

// A name of a file, without a path.
bool is_file_name(const std::string& name);
std::string file_name(const Json& value);

// The text of a file of at most 64 MB. Throws BundleError.
std::string read_text(const std::filesystem::path& path);

}  // namespace headpool::detail
