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
// Each loop is there twice: portable, a mask word of 64 bits at a time; and for AVX-512 VBMI2,
// which closes or opens the gaps in a whole register with one instruction.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define BESA_WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")))
#endif

#define BESA_INLINE inline __attribute__((always_inline))
#define BESA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;

constexpr int64_t kWord = 64;

// The bits that tell a zero from the rest: -0.0 is one.
template <class T>
constexpr T kMagnitude = sizeof(T) == 1 ? T(~T(0)) : T(T(~T(0)) >> 1);

BESA_INLINE uint64_t little_endian(uint64_t word) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(word);
#else
    return word;
#endif
}

// The bits of the next n columns, 1 <= n <= kStep, without the last byte's beyond them. A copy of a
// size that the compiler knows is one instruction; only a row's end takes the other.
template <int64_t kStep>
BESA_INLINE uint64_t load_bits(const uint8_t* bits, int64_t n) {
    uint64_t word = 0;
    if (n == kStep)
        std::memcpy(&word, bits, kStep / 8);
    else
        std::memcpy(&word, bits, static_cast<std::size_t>((n + 7) / 8));
    return little_endian(word) & (~uint64_t(0) >> (kWord - n));
}

template <int64_t kStep>
BESA_INLINE void store_bits(uint8_t* bits, uint64_t word, int64_t n) {
    word = little_endian(word);
    if (n == kStep)
        std::memcpy(bits, &word, kStep / 8);
    else
        std::memcpy(bits, &word, static_cast<std::size_t>((n + 7) / 8));
}

// Without the instruction, which not every x86-64 has.
BESA_INLINE int64_t popcount(uint64_t x) {
    x -= (x >> 1) & 0x5555555555555555;
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return static_cast<int64_t>((x * 0x0101010101010101) >> 56);
}

// Below, `left` is the number of values that the row's pointers grant it. False says that its bits
// ask for more (found before any of those is touched) or for fewer.

struct Portable {
    template <class T>
    static int64_t mask(const T* row, uint8_t* bits, int64_t cols) {
        int64_t count = 0;
        for (int64_t j = 0; j < cols; j += kWord) {
            const int64_t n = std::min(kWord, cols - j);
            uint8_t flags[kWord];
            if (n == kWord) {
                for (int64_t k = 0; k < kWord; ++k) flags[k] = (row[j + k] & kMagnitude<T>) != 0;
            } else {
                for (int64_t k = 0; k < kWord; ++k)
                    flags[k] = k < n && (row[j + k] & kMagnitude<T>) != 0;
            }
            uint64_t word = 0;
            for (int64_t k = 0; k < kWord; k += 8) {
                uint64_t eight;  // a flag a byte; the product gathers them in its top byte
                std::memcpy(&eight, flags + k, 8);
                word |= ((little_endian(eight) * 0x0102040810204080) >> 56) << k;
            }
            store_bits<kWord>(bits + j / 8, word, n);
            count += popcount(word);
        }
        return count;
    }

    static int64_t count(const uint8_t* bits, int64_t cols) {
        int64_t count = 0;
        for (int64_t j = 0; j < cols; j += kWord)
            count += popcount(load_bits<kWord>(bits + j / 8, std::min(kWord, cols - j)));
        return count;
    }

    template <class T>
    static bool compress(const T* row, const uint8_t* bits, T* values, int64_t cols, int64_t left) {
        for (int64_t j = 0; j < cols; j += kWord) {
            uint64_t word = load_bits<kWord>(bits + j / 8, std::min(kWord, cols - j));
            left -= popcount(word);
            if (left < 0) return false;
            for (; word; word &= word - 1) *values++ = row[j + __builtin_ctzll(word)];
        }
        return left == 0;
    }

    template <class T>
    static bool expand(const T* values, const uint8_t* bits, T* row, int64_t cols, int64_t left) {
        for (int64_t j = 0; j < cols; j += kWord) {
            const int64_t n = std::min(kWord, cols - j);
            uint64_t word = load_bits<kWord>(bits + j / 8, n);
            left -= popcount(word);
            if (left < 0) return false;
            std::fill_n(row + j, n, T(0));
            for (; word; word &= word - 1) row[j + __builtin_ctzll(word)] = *values++;
        }
        return left == 0;
    }
};

#ifdef BESA_WIDE

// A register of T. Loads and stores touch only the lanes in the mask, so that neither a row's end
// nor a buffer's needs care. (Compressing straight to memory is slow on some processors.)
template <class T>
struct Lanes;

template <>
struct Lanes<uint8_t> {
    using Mask = __mmask64;
    BESA_WIDE static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi8(m, p); }
    BESA_WIDE static void store(void* p, Mask m, __m512i x) { _mm512_mask_storeu_epi8(p, m, x); }
    BESA_WIDE static Mask nonzero(__m512i x) { return _mm512_test_epi8_mask(x, x); }
    BESA_WIDE static __m512i pack(Mask m, __m512i x) { return _mm512_maskz_compress_epi8(m, x); }
    BESA_WIDE static __m512i spread(Mask m, __m512i x) { return _mm512_maskz_expand_epi8(m, x); }
};

template <>
struct Lanes<uint16_t> {
    using Mask = __mmask32;
    BESA_WIDE static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi16(m, p); }
    BESA_WIDE static void store(void* p, Mask m, __m512i x) { _mm512_mask_storeu_epi16(p, m, x); }
    BESA_WIDE static Mask nonzero(__m512i x) {
        return _mm512_test_epi16_mask(x, _mm512_set1_epi16(kMagnitude<uint16_t>));
    }
    BESA_WIDE static __m512i pack(Mask m, __m512i x) { return _mm512_maskz_compress_epi16(m, x); }
    BESA_WIDE static __m512i spread(Mask m, __m512i x) { return _mm512_maskz_expand_epi16(m, x); }
};

template <>
struct Lanes<uint32_t> {
    using Mask = __mmask16;
    BESA_WIDE static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi32(m, p); }
    BESA_WIDE static void store(void* p, Mask m, __m512i x) { _mm512_mask_storeu_epi32(p, m, x); }
    BESA_WIDE static Mask nonzero(__m512i x) {
        return _mm512_test_epi32_mask(x, _mm512_set1_epi32(kMagnitude<uint32_t>));
    }
    BESA_WIDE static __m512i pack(Mask m, __m512i x) { return _mm512_maskz_compress_epi32(m, x); }
    BESA_WIDE static __m512i spread(Mask m, __m512i x) { return _mm512_maskz_expand_epi32(m, x); }
};

template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

// The lowest n lanes of a register.
template <class T>
BESA_WIDE inline typename Lanes<T>::Mask below(int64_t n) {
    return static_cast<typename Lanes<T>::Mask>(_bzhi_u64(~uint64_t(0), static_cast<unsigned>(n)));
}

struct Wide {
    template <class T>
    BESA_WIDE static int64_t mask(const T* row, uint8_t* bits, int64_t cols) {
        int64_t count = 0;
        for (int64_t j = 0; j < cols; j += kLanes<T>) {
            const int64_t n = std::min(kLanes<T>, cols - j);
            const uint64_t word = Lanes<T>::nonzero(Lanes<T>::load(below<T>(n), row + j));
            store_bits<kLanes<T>>(bits + j / 8, word, n);
            count += _mm_popcnt_u64(word);
        }
        return count;
    }

    BESA_WIDE static int64_t count(const uint8_t* bits, int64_t cols) {
        int64_t count = 0;
        for (int64_t j = 0; j < cols; j += kWord)
            count += _mm_popcnt_u64(load_bits<kWord>(bits + j / 8, std::min(kWord, cols - j)));
        return count;
    }

    template <class T>
    BESA_WIDE static bool compress(const T* row, const uint8_t* bits, T* values, int64_t cols,
                                   int64_t left) {
        using Mask = typename Lanes<T>::Mask;
        for (int64_t j = 0; j < cols; j += kLanes<T>) {
            const int64_t n = std::min(kLanes<T>, cols - j);
            const uint64_t word = load_bits<kLanes<T>>(bits + j / 8, n);
            const int64_t count = _mm_popcnt_u64(word);
            left -= count;
            if (left < 0) return false;
            const __m512i x = Lanes<T>::load(below<T>(n), row + j);
            Lanes<T>::store(values, below<T>(count), Lanes<T>::pack(static_cast<Mask>(word), x));
            values += count;
        }
        return left == 0;
    }

    template <class T>
    BESA_WIDE static bool expand(const T* values, const uint8_t* bits, T* row, int64_t cols,
                                 int64_t left) {
        using Mask = typename Lanes<T>::Mask;
        for (int64_t j = 0; j < cols; j += kLanes<T>) {
            const int64_t n = std::min(kLanes<T>, cols - j);
            const uint64_t word = load_bits<kLanes<T>>(bits + j / 8, n);
            const int64_t count = _mm_popcnt_u64(word);
            left -= count;
            if (left < 0) return false;
            const __m512i x = Lanes<T>::load(below<T>(count), values);
            Lanes<T>::store(row + j, below<T>(n), Lanes<T>::spread(static_cast<Mask>(word), x));
            values += count;
        }
        return left == 0;
    }
};

bool has_wide() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

#else

using Wide = Portable;

bool has_wide() { return false; }

#endif

// Calls body(isa, element): the instruction set and the element's type at hand as objects.
template <class Body>
void choose(int64_t size, int wide, Body body) {
    const auto with = [&](auto isa) {
        if (size == 1)
            body(isa, uint8_t());
        else if (size == 2)
            body(isa, uint16_t());
        else
            body(isa, uint32_t());
    };
    if (wide && has_wide())
        with(Wide());
    else
        with(Portable());
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
    (void)threads;  // a build without OpenMP has one
    bool sound = row_ptr[0] == 0 && row_ptr[rows] == n_values;
    for (int64_t r = 0; r < rows; ++r) sound = sound && row_ptr[r] <= row_ptr[r + 1];
    if (!sound) return false;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : sound)
    for (int64_t r = 0; r < rows; ++r)
        sound = row(r, row_ptr[r], row_ptr[r + 1] - row_ptr[r]) && sound;
    return sound;
}

}  // namespace

// Common to the functions below: row-major [rows, cols] weight or dense, elements of `size` bytes
// (1, 2 or 4); bitmask [rows, ceil(cols / 8)], little-endian bits; row_ptr [rows + 1]; values
// [n_values]. `wide` 0 keeps to portable code, 1 allows AVX-512 where the processor has it.

// Writes the bitmask, zeros past the last column included, and row_ptr.
BESA_EXPORT void besa_pack_mask(const void* weight, uint8_t* bitmask, int64_t* row_ptr,
                                int64_t rows, int64_t cols, int64_t size, int threads, int wide) {
    (void)threads;
    const int64_t bytes = (cols + 7) / 8;
    choose(size, wide, [&](auto isa, auto element) {
        const auto* in = static_cast<const decltype(element)*>(weight);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t r = 0; r < rows; ++r)
            row_ptr[r + 1] = isa.mask(in + r * cols, bitmask + r * bytes, cols);
    });
    sum_up(row_ptr, rows);
}

// Writes row_ptr from all bits of a bitmask of `bytes` a row.
BESA_EXPORT void besa_row_pointers(const uint8_t* bitmask, int64_t* row_ptr, int64_t rows,
                                   int64_t bytes, int threads, int wide) {
    (void)threads;
    choose(1, wide, [&](auto isa, auto) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t r = 0; r < rows; ++r)
            row_ptr[r + 1] = isa.count(bitmask + r * bytes, 8 * bytes);
    });
    sum_up(row_ptr, rows);
}

// Writes values. Gives 1, with values unfinished, if row_ptr, bitmask and n_values disagree; else 0.
BESA_EXPORT int besa_compress(const void* weight, const uint8_t* bitmask, const int64_t* row_ptr,
                              void* values, int64_t rows, int64_t cols, int64_t size,
                              int64_t n_values, int threads, int wide) {
    const int64_t bytes = (cols + 7) / 8;
    bool sound = false;
    choose(size, wide, [&](auto isa, auto element) {
        const auto* in = static_cast<const decltype(element)*>(weight);
        auto* out = static_cast<decltype(element)*>(values);
        sound = every_row(row_ptr, rows, n_values, threads, [&](int64_t r, int64_t v, int64_t n) {
            return isa.compress(in + r * cols, bitmask + r * bytes, out + v, cols, n);
        });
    });
    return sound ? 0 : 1;
}

// Writes dense, its zeros included. Gives 1 or 0 as above.
BESA_EXPORT int besa_expand(const void* values, const uint8_t* bitmask, const int64_t* row_ptr,
                            void* dense, int64_t rows, int64_t cols, int64_t size,
                            int64_t n_values, int threads, int wide) {
    const int64_t bytes = (cols + 7) / 8;
    bool sound = false;
    choose(size, wide, [&](auto isa, auto element) {
        const auto* in = static_cast<const decltype(element)*>(values);
        auto* out = static_cast<decltype(element)*>(dense);
        sound = every_row(row_ptr, rows, n_values, threads, [&](int64_t r, int64_t v, int64_t n) {
            return isa.expand(in + v, bitmask + r * bytes, out + r * cols, cols, n);
        });
    });
    return sound ? 0 : 1;
}
