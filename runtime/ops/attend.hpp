// What kernels.cpp puts into its table of attention's functions (attend.cpp).
#pragma once

#include "kernels.hpp"

namespace headpool::HEADPOOL_ISA {

void rotate(float* to, const float* from, const float* cos, const float* sin, size_t D, size_t rotary);
void keep(CacheType type, const float* from, size_t size, char* row);
void attend(const Attention& a, const Tile& tile, float* scratch);
size_t scratch_floats(const Attention& a, const Tile& tile);

}  // namespace headpool::HEADPOOL_ISA
