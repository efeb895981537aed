// The inputs and outputs of a variant's graphs, as headpool.json has them.
#pragma once

#include "fields.hpp"
#include "manifest.hpp"

namespace headpool::detail {

// Reads them into `variant`, whose other members are set. Throws Flaw where they are not those of its cache form.
void read_bindings(const Json& data, Variant& variant);

}  // namespace headpool::detail
