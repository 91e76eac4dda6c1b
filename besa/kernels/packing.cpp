// Takes the zeros out of a matrix and puts them back: the bitmask, the row pointers, the nonzeros.
//
// Elements are bit patterns of 1, 2 or 4 bytes: int8, and floats of 16 and 32 bits, in which all
// bits but the sign say whether they are zero. So NaNs keep their payloads, and no setting of how
// the processor treats denormals can lose one.
//
// Rows are shared out between threads, and a row never writes beyond its own part of an array.
// What is read need not be sound: a row whose bits and pointers disagree is reported, and nothing
// is read or written past the arrays' ends.
//
// The loops over a row are there twice: in packing_portable.h, a mask word of 64 bits at a time, and
// in packing_avx512.h.

#include "packing.h"

#include <atomic>
#include <cstdint>

#include "abi.h"
#include "packing_avx512.h"
#include "packing_portable.h"
#include "threads.h"

namespace {

#ifdef __x86_64__
bool isa_has_avx512(int isa) {
    return isa >= besa::kAvx512 && isa <= besa::kAvx512Amx;
}
#endif

// Calls body(loops, element): the loops for an instruction set and the element's type, as objects.
template <class Body>
void choose(int64_t size, int isa, Body body) {
    const auto with = [&](auto loops) {
        if (size == 1)
            body(loops, uint8_t());
        else if (size == 2)
            body(loops, uint16_t());
        else
            body(loops, uint32_t());
    };
#ifdef __x86_64__
    if (isa_has_avx512(isa) && has_avx512_packing()) return with(Avx512Packing());
#endif
    (void)isa;
    with(PortablePacking());
}

// row_ptr[r + 1] = the number of row r's values, on entry; of all values up to it, on return.
void sum_up(int64_t* row_ptr, int64_t rows) {
    row_ptr[0] = 0;
    for (int64_t r = 0; r < rows; ++r) row_ptr[r + 1] += row_ptr[r];
}

// Calls row(r, its first value, its number of values) for each row, all of them within n_values.
// False if one of the calls says so, or without any call if the pointers are no such partition.
template <class Row>
bool every_row(const int64_t* row_ptr, int64_t rows, int64_t n_values, int threads, Row row) {
    bool sound = row_ptr[0] == 0 && row_ptr[rows] == n_values;
    for (int64_t r = 0; r < rows; ++r) sound = sound && row_ptr[r] <= row_ptr[r + 1];
    if (!sound) return false;
    std::atomic<bool> all{true};
    besa::over_rows(rows, threads, [&](int64_t r) {
        if (!row(r, row_ptr[r], row_ptr[r + 1] - row_ptr[r])) all = false;
    });
    return all;
}

}  // namespace

// Common to the functions below: row-major [rows, cols] weight or dense, elements of `size` bytes
// (1, 2 or 4); bitmask [rows, ceil(cols / 8)], little-endian bits; row_ptr [rows + 1]; values
// [n_values]. `isa` is a besa::Isa: with one of AVX-512, that is used where the processor has VBMI2.

// Writes the bitmask, zeros past the last column included, and row_ptr.
BESA_API void besa_pack_mask(const void* weight, uint8_t* bitmask, int64_t* row_ptr,
                             int64_t rows, int64_t cols, int64_t size, int threads, int isa) {
    const int64_t bytes = (cols + 7) / 8;
    choose(size, isa, [&](auto loops, auto element) {
        const auto* in = static_cast<const decltype(element)*>(weight);
        besa::over_rows(rows, threads, [&](int64_t r) {
            row_ptr[r + 1] = loops.mask(in + r * cols, bitmask + r * bytes, cols);
        });
    });
    sum_up(row_ptr, rows);
}

// Writes row_ptr from all bits of a bitmask of `bytes` a row.
BESA_API void besa_row_pointers(const uint8_t* bitmask, int64_t* row_ptr, int64_t rows,
                                int64_t bytes, int threads, int isa) {
    choose(1, isa, [&](auto loops, auto) {
        besa::over_rows(rows, threads, [&](int64_t r) {
            row_ptr[r + 1] = loops.count(bitmask + r * bytes, 8 * bytes);
        });
    });
    sum_up(row_ptr, rows);
}

// Writes values. Gives 1, with values unfinished, if row_ptr, bitmask and n_values disagree; else 0.
BESA_API int besa_compress(const void* weight, const uint8_t* bitmask, const int64_t* row_ptr,
                           void* values, int64_t rows, int64_t cols, int64_t size,
                           int64_t n_values, int threads, int isa) {
    const int64_t bytes = (cols + 7) / 8;
    bool sound = false;
    choose(size, isa, [&](auto loops, auto element) {
        const auto* in = static_cast<const decltype(element)*>(weight);
        auto* out = static_cast<decltype(element)*>(values);
        sound = every_row(row_ptr, rows, n_values, threads, [&](int64_t r, int64_t v, int64_t n) {
            return loops.compress(in + r * cols, bitmask + r * bytes, out + v, cols, n);
        });
    });
    return sound ? 0 : 1;
}

// Writes dense, its zeros included. Gives 1 or 0 as above.
BESA_API int besa_expand(const void* values, const uint8_t* bitmask, const int64_t* row_ptr,
                         void* dense, int64_t rows, int64_t cols, int64_t size,
                         int64_t n_values, int threads, int isa) {
    const int64_t bytes = (cols + 7) / 8;
    bool sound = false;
    choose(size, isa, [&](auto loops, auto element) {
        const auto* in = static_cast<const decltype(element)*>(values);
        auto* out = static_cast<decltype(element)*>(dense);
        sound = every_row(row_ptr, rows, n_values, threads, [&](int64_t r, int64_t v, int64_t n) {
            return loops.expand(in + v, bitmask + r * bytes, out + r * cols, cols, n);
        });
    });
    return sound ? 0 : 1;
}
