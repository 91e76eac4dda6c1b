// Sums of a matrix's elements by bucket, row by row: the gradient of BESA's rates.
//
//     out[r, b] = sum over j with buckets[r, j] == b of values[r, j] * weight[r, j]
//
// A plain histogram waits on itself: adding to a bucket that was just written must wait for that
// store to come back. So a row fills kLanes private histograms in turn, and adds them up at its
// end. A row is never split between threads: the result depends on the shape alone.

#include <cstdint>

#include "api.h"
#include "threads.h"

namespace {

constexpr int kBuckets = 256;  // every uint8 has its place, so no bucket can write out of bounds
constexpr int kLanes = 4;

template <bool kWeighted>
void sum_row(const float* values, const float* weight, const std::uint8_t* buckets, float* out,
             std::int64_t cols, std::int64_t n_buckets) {
    float sums[kLanes][kBuckets] = {};
    const auto add = [&](int lane, std::int64_t j) {
        sums[lane][buckets[j]] += kWeighted ? values[j] * weight[j] : values[j];
    };
    std::int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) add(lane, j + lane);
    for (int lane = 0; j < cols; ++lane, ++j) add(lane, j);
    for (std::int64_t b = 0; b < n_buckets; ++b)
        out[b] = (sums[0][b] + sums[1][b]) + (sums[2][b] + sums[3][b]);
}

}  // namespace

// Row-major [rows, cols] values, weight (or null) and buckets; [rows, n_buckets] out, overwritten.
// n_buckets <= 256; elements in a bucket past it are left out.
BESA_API void besa_segment_sum_f32(
    const float* values, const float* weight_or_null, const std::uint8_t* buckets, float* out,
    std::int64_t rows, std::int64_t cols, std::int64_t n_buckets, int threads) {
    besa::over_rows(rows, threads, [&](std::int64_t r) {
        const float* row = values + r * cols;
        const std::uint8_t* row_buckets = buckets + r * cols;
        float* row_out = out + r * n_buckets;
        if (weight_or_null)
            sum_row<true>(row, weight_or_null + r * cols, row_buckets, row_out, cols, n_buckets);
        else
            sum_row<false>(row, nullptr, row_buckets, row_out, cols, n_buckets);
    });
}
