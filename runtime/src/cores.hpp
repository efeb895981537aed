#pragma once

namespace headpool::detail {

// Cores this process may use, hyper-threads not counted: both threads of a core share the units that attention needs.
int physical_cores();

}  // namespace headpool::detail
