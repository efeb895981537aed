// A file that is whole or absent, and that is known to have a place before the work that it is for.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <headpool/error.hpp>
#include <string>
#include <system_error>
#include <utility>

class Output {
 public:
  // Throws ArgumentError where `path` exists or no file can be made there.
  explicit Output(const std::filesystem::path& path)
      : path_(path), partial_(path.string() + "." + std::to_string(getpid()) + ".partial") {
    refuse_existing();
    if (!path.has_filename()) fail("it is a folder's name");
    Partial(*this).close();
  }

  // Under another name first, which nothing is left of where it fails.
  void write(const std::string& text) const {
    for (const int signal : {SIGINT, SIGTERM}) std::signal(signal, SIG_IGN);  // the last thing the program does
    Partial partial(*this);
    if (std::fwrite(text.data(), 1, text.size(), partial.file) != text.size()) fail(reason());
    partial.close();
    refuse_existing();
    std::error_code failure;
    std::filesystem::rename(partial_, path_, failure);
    if (failure) fail(failure.message());
  }

 private:
  struct Partial {
    explicit Partial(const Output& o) : output(o), file(std::fopen(o.partial_.c_str(), "wx")) {
      if (!file) output.fail(reason());
    }
    ~Partial() {
      if (file) std::fclose(file);
      std::error_code ignored;  // it has the other name by now, or is not wanted
      std::filesystem::remove(output.partial_, ignored);
    }
    void close() {
      if (std::fclose(std::exchange(file, nullptr)) != 0) output.fail(reason());
    }

    const Output& output;
    std::FILE* file;
  };

  static std::string reason() { return std::generic_category().message(errno); }

  void refuse_existing() const {
    std::error_code failure;
    const std::filesystem::file_status status = std::filesystem::symlink_status(path_, failure);
    if (std::filesystem::is_character_file(status))
      throw headpool::ArgumentError(path_.string() + " is a device; choose the name of a file");
    if (std::filesystem::exists(status))
      throw headpool::ArgumentError(path_.string() + " exists; choose another name or remove it");
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw headpool::ArgumentError(path_.string() + " cannot be written: " + why + "; choose another place");
  }

  std::filesystem::path path_, partial_;
};
