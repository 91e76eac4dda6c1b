#pragma once

#include "threads.h"

#include <cstdint>
#include <vector>

// Whether each of some rows is seen once.
inline bool each_once(std::int64_t rows, int threads) {
    std::vector<int> seen(rows);
    besa::over_rows(rows, threads, [&](std::int64_t r) { ++seen[r]; });
    for (const int times : seen)
        if (times != 1) return false;
    return true;
}
