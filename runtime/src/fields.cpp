#include "fields.hpp"

#include <algorithm>
#include <fstream>
#include <headpool/error.hpp>

namespace headpool::detail {
namespace {

constexpr std::uintmax_t MOST_BYTES = 64 << 20;
constexpr int DEEPEST = 32;

}  // namespace

Json parse_json(std::string_view text) {
  const auto shallow = [](int depth, Json::parse_event_t, Json&) {
    if (depth > DEEPEST) flaw("it is nested too deeply");
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), shallow);
  } catch (const Json::parse_error& error) {
    flaw("it is no JSON from byte " + std::to_string(error.byte) + " on");
  } catch (const Json::exception&) {
    flaw("it holds a number that is too large");
  }
}

std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() > 60 ? text.substr(0, 57) + "..." : text;
}

const Json& at(const Json& object, const char* key) {
  if (!object.is_object()) flaw(shown(object) + " stands where an object with " + key + " is due");
  const auto found = object.find(key);
  if (found == object.end()) flaw(std::string("it lacks ") + key);
  return *found;
}

std::string text(const Json& object, const char* key) {
  const Json& value = at(object, key);
  if (!value.is_string()) flaw(std::string(key) + " is " + shown(value) + ", not a text");
  return value.get<std::string>();
}

std::string one_of(const Json& object, const char* key, std::initializer_list<const char*> choices) {
  const std::string value = text(object, key);
  if (std::find(choices.begin(), choices.end(), value) == choices.end()) flaw(std::string(key) + " is " + shown(value));
  return value;
}

const Json& array(const Json& object, const char* key) {
  const Json& value = at(object, key);
  if (!value.is_array()) flaw(std::string(key) + " is " + shown(value) + ", not a list");
  return value;
}

std::int64_t number(const Json& value, const char* what, std::int64_t least, std::int64_t most) {
  // nlohmann has them as signed or unsigned.
  const bool whole = value.is_number_integer() &&
                     (!value.is_number_unsigned() || value.get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX));
  if (!whole || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
    flaw(std::string(what) + " is " + shown(value) + ", not a whole number from " + std::to_string(least) + " to " +
         std::to_string(most));
  return value.get<std::int64_t>();
}

std::int64_t size_in(const Json& object, const char* key) { return number(at(object, key), key, 1, MOST); }

bool is_file_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find_first_of(std::string_view("/\\:\0", 4)) == std::string::npos;
}

std::string file_name(const Json& value) {
  const std::string name = value.is_string() ? value.get<std::string>() : "";
  if (!is_file_name(name)) flaw("it names " + shown(value) + ", which is not a file name in its own folder");
  return name;
}

std::string read_text(const std::filesystem::path& path) {
  std::error_code failed;
  const std::uintmax_t size = std::filesystem::file_size(path, failed);
  if (failed || size > MOST_BYTES) throw BundleError(path.string() + " cannot be read or is too large");
  std::string text(size, '\0');
  std::ifstream file(path, std::ios::binary);
  if (!file.read(text.data(), static_cast<std::streamsize>(size))) throw BundleError(path.string() + " cannot be read");
  return text;
}

}  // namespace headpool::detail
