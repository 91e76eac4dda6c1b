// Packing and unpacking a row in plain C++, 64 columns at a time. See packing.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common.h"

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

BESA_INLINE inline uint64_t little_endian(uint64_t word) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(word);
#else
    return word;
#endif
}

// The bits of the next n columns, 1 <= n <= kStep, without the last byte's beyond them. A copy of a
// size that the compiler knows is one instruction; only a row's end takes the other.
template <int64_t kStep>
BESA_INLINE inline uint64_t load_bits(const uint8_t* bits, int64_t n) {
    uint64_t word = 0;
    if (n == kStep)
        std::memcpy(&word, bits, kStep / 8);
    else
        std::memcpy(&word, bits, static_cast<std::size_t>((n + 7) / 8));
    return little_endian(word) & (~uint64_t(0) >> (kWord - n));
}

template <int64_t kStep>
BESA_INLINE inline void store_bits(uint8_t* bits, uint64_t word, int64_t n) {
    word = little_endian(word);
    if (n == kStep)
        std::memcpy(bits, &word, kStep / 8);
    else
        std::memcpy(bits, &word, static_cast<std::size_t>((n + 7) / 8));
}

// Without the instruction, which not every x86-64 has.
BESA_INLINE inline int64_t popcount(uint64_t x) {
    x -= (x >> 1) & 0x5555555555555555;
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f;
    return static_cast<int64_t>((x * 0x0101010101010101) >> 56);
}

// Below, `left` is the number of values that the row's pointers grant it. False says that its bits
// ask for more (found before any of those is touched) or for fewer.

struct PortablePacking {
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

}  // namespace
