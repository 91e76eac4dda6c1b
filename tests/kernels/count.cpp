// A packed product some times over, for its instructions to be counted:
//     count LIBRARY DTYPE TOKENS ISA TIMES
// See test_instructions.py and test_arm.py.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "abi.h"

int main(int, char** argv) {
    constexpr std::int64_t kRows = 64, kCols = 2048;
    const int dtype = std::atoi(argv[2]), tokens = std::atoi(argv[3]), isa = std::atoi(argv[4]);
    void* library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::puts(dlerror()), 1;
    const auto product =
        reinterpret_cast<int (*)(const besa::Job*)>(dlsym(library, "besa_sparse_linear"));
    if (!product) return std::puts(dlerror()), 1;

    std::vector<std::uint8_t> mask(kRows * kCols / 8), values(kRows * kCols * 4);
    std::vector<std::int64_t> row_ptr{0};
    std::uint32_t state = 1;
    for (std::int64_t r = 0; r < kRows; ++r) {
        std::int64_t count = 0;
        for (std::int64_t i = 0; i < kCols / 8; ++i) {
            state = state * 1664525u + 1013904223u;
            mask[r * kCols / 8 + i] = static_cast<std::uint8_t>(state >> 24);  // half of the bits
            count += __builtin_popcount(state >> 24);
        }
        row_ptr.push_back(row_ptr.back() + count);
    }
    const std::vector<float> scale(kRows, 1.0f);
    const std::vector<std::uint16_t> input(tokens * kCols, 0x3F80);  // ones in bfloat16
    std::vector<std::uint16_t> output(tokens * kRows);
    besa::Job job{};
    job.values = values.data();
    job.bitmask = mask.data();
    job.row_ptr = row_ptr.data();
    job.scale = dtype == besa::kInt8 ? scale.data() : nullptr;
    job.input = input.data();
    job.output = output.data();
    job.n_values = row_ptr.back();
    job.tokens = tokens;
    job.rows = kRows;
    job.cols = kCols;
    job.values_dtype = dtype;
    job.input_dtype = besa::kBf16;
    job.int8_input = 1;
    job.isa = isa;
    job.threads = 1;
    int status = 0;
    for (int times = std::atoi(argv[5]); times > 0; --times) status |= product(&job);
    return status;
}
