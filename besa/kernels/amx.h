// AMX: registers that are matrices, for what is compiled with its flags.
//
// A register has 16 rows of 64 bytes, and an instruction multiplies two of them and adds the result to
// a third. The compiler's own functions want literal numbers of registers, and GCC's do not say that
// they read memory; hence these.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "common.h"

namespace besa {
namespace {

constexpr int kRegisterRows = 16;
constexpr int kLine = 64;  // bytes of a row
constexpr int kRegisterBytes = kRegisterRows * kLine;

// The eight registers, all of that shape, for as long as this lives on a thread.
class AmxRegisters {
   public:
    AmxRegisters() {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {};
            std::uint8_t rows[16] = {};
        } shapes;
        std::fill_n(shapes.row_bytes, 8, kLine);
        std::fill_n(shapes.rows, 8, kRegisterRows);
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~AmxRegisters() { asm volatile("tilerelease"); }
    AmxRegisters(const AmxRegisters&) = delete;
    AmxRegisters& operator=(const AmxRegisters&) = delete;
};

template <int kTo>
BESA_INLINE inline void zero_register() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTo));
}

template <int kTo>
BESA_INLINE inline void load_register(const void* from) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(std::int64_t{kLine}), "i"(kTo)
                 : "memory");
}

// The same of what the first-level cache need not keep.
template <int kTo>
BESA_INLINE inline void load_register_once(const void* from) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(std::int64_t{kLine}), "i"(kTo)
                 : "memory");
}

template <int kFrom>
BESA_INLINE inline void store_register(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(std::int64_t{kLine}), "i"(kFrom)
                 : "memory");
}

// kSums [16, 16 float32] += kA [16, 32 bfloat16] * kB [16 pairs, 16]; subnormal numbers are zeros.
template <int kSums, int kA, int kB>
BESA_INLINE inline void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

// kSums [16, 16 int32] += kA [16, 64 int8] * kB [16 fours, 16].
template <int kSums, int kA, int kB>
BESA_INLINE inline void multiply_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

// Writes 16 rows of 16 words of 32 bits, which lie at row(0) to row(15), as columns.
template <class Row>
BESA_INLINE inline void transpose(const Row& row, void* out) {
    char* const to = static_cast<char*>(out);
    __m512i a[16], b[16];
    each<16>([&](auto i) BESA_INLINE { a[i] = _mm512_loadu_si512(row(i)); });
    each<8>([&](auto i) BESA_INLINE {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    });
    // a[4 i + j] gets words j, j + 4, j + 8 and j + 12, each of rows 4 i to 4 i + 3.
    each<4>([&](auto i) BESA_INLINE {
        each<2>([&](auto j) BESA_INLINE {
            a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + 2 + j]);
            a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + 2 + j]);
        });
    });
    constexpr int kEven = 0x88, kOdd = 0xDD;  // of the four 128-bit parts of two registers
    each<4>([&](auto j) BESA_INLINE {
        const auto put = [&](int word, __m512i top, __m512i bottom) BESA_INLINE {
            _mm512_storeu_si512(to + word * kLine, _mm512_shuffle_i32x4(top, bottom, kEven));
            _mm512_storeu_si512(to + (word + 8) * kLine, _mm512_shuffle_i32x4(top, bottom, kOdd));
        };
        put(j, _mm512_shuffle_i32x4(a[j], a[4 + j], kEven),
            _mm512_shuffle_i32x4(a[8 + j], a[12 + j], kEven));
        put(j + 4, _mm512_shuffle_i32x4(a[j], a[4 + j], kOdd),
            _mm512_shuffle_i32x4(a[8 + j], a[12 + j], kOdd));
    });
}

}  // namespace
}  // namespace besa
