// One packed product, for callgrind to count: count LIBRARY DTYPE TOKENS ISA. See
// test_instructions.py.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int, char** argv) {
    constexpr std::int64_t kRows = 64, kCols = 2048;
    const int dtype = std::atoi(argv[2]), tokens = std::atoi(argv[3]), isa = std::atoi(argv[4]);
    void* library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::puts(dlerror()), 1;
    const auto product = reinterpret_cast<int (*)(
        const void*, int, std::int64_t, const std::uint8_t*, const std::int64_t*, const float*,
        std::int64_t, const void*, const void*, int, void*, std::int64_t, std::int64_t,
        std::int64_t, int, int, int)>(dlsym(library, "besa_sparse_linear"));

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
    return product(values.data(), dtype, row_ptr.back(), mask.data(), row_ptr.data(),
                   dtype == 3 ? scale.data() : nullptr, 0, nullptr, input.data(), 0, output.data(),
                   tokens, kRows, kCols, 1, isa, 1);
}
