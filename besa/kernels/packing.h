// What packing.cpp exports and other native code calls, too.

#pragma once

#include <cstdint>

#include "api.h"

BESA_API void besa_row_pointers(const std::uint8_t* bitmask, std::int64_t* row_ptr,
                                std::int64_t rows, std::int64_t bytes, int threads, int isa);
