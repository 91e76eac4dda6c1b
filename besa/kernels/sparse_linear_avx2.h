// What the instruction sets with AVX2 share. No instruction expands: a shuffle of bytes puts values to
// their places, and tables say how, with a row for each byte of the mask, that is for 8 weights. Two
// bytes go at a time:
//
//     mask      1 0 0 1 0 0 1 0   0 1 1 0 0 0 1 0
//     values    . . . . . a b c   d e f . . . . .     one load
//     places    5 . . 6 . . 7 .   . 0 1 . . . 2 .     the bytes' rows; nothing goes where a "." is
//     weights   a 0 0 b 0 0 c 0   0 d e 0 0 0 f 0     one shuffle
//
// The border between the two bytes' values is in the middle of the load, which so serves both: the
// first byte's row counts from the end. Where the border is, the number of bits before it tells. So
// no step waits for the one before it but for one addition, and an instruction a weight is enough.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "nibbles.h"
#include "run.h"

namespace besa {
namespace {

// For each byte of a mask, which bytes 8 weights of kBytes are shuffled from: if their values end in
// the middle of a load, and if they begin there. Shuffles count within 16 bytes. That is where a byte's
// 16-bit weights have a half of the load to themselves, but 8-bit ones share it.
template <int kBytes>
struct Places {
    static constexpr int kWidth = 8 * kBytes;
    alignas(64) std::uint8_t first[256][kWidth];
    alignas(64) std::uint8_t second[256][kWidth];

    constexpr Places() : first(), second() {
        for (int mask = 0; mask < 256; ++mask) {
            int from_end = kWidth, from_start = kWidth % 16;
            for (int place = 0; place < 8; ++place) from_end -= kBytes * (mask >> place & 1);
            for (int i = 0; i < kWidth; ++i) {
                const bool there = mask >> i / kBytes & 1;
                first[mask][i] = static_cast<std::uint8_t>(there ? from_end++ : 0x80);
                second[mask][i] = static_cast<std::uint8_t>(there ? from_start++ : 0x80);
            }
        }
    }
};

constexpr Places<1> kPlaces8;
constexpr Places<2> kPlaces16;

inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

inline __m256i join(__m128i low, __m128i high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

inline std::uint64_t count(std::uint64_t bits) {
    return static_cast<std::uint64_t>(_mm_popcnt_u64(bits));
}

// A mask that begins with bit `from`. Unlike a shift, it is one instruction and takes no copy.
inline std::uint64_t rotated(std::uint64_t mask, int from) {
    return mask >> from % 64 | mask << (64 - from) % 64;
}

// What to load for the bytes of a mask at `bit` and at bit + 8, 8 values on either side of the border.
// `first` has the bits of the first byte, wherever.
template <class Value>
BESA_INLINE inline const Value* around_border(const Value* p, std::uint64_t mask, int bit,
                                              std::uint64_t first) {
    const std::uint64_t before = bit ? count(mask << (56 - bit)) : count(first);
    return p + before - 8;
}

// Several registers. They are copied one by one: as a whole, an array would go through memory (GCC).
template <class V, int N>
struct Registers {
    V of[N];

    Registers() = default;
    BESA_INLINE Registers(const Registers& from) { *this = from; }
    BESA_INLINE Registers& operator=(const Registers& from) {
        each<N>([&](auto i) BESA_INLINE { of[i] = from.of[i]; });
        return *this;
    }
    BESA_INLINE V& operator[](int i) { return of[i]; }
    BESA_INLINE const V& operator[](int i) const { return of[i]; }
};

// Weights `bit` to bit + 15 of a step in 8 bits each.
template <class Value>
BESA_INLINE inline __m128i expand8(const Value* p, std::uint64_t mask, int bit) {
    const std::uint64_t first = rotated(mask, bit) & 0xFF, second = rotated(mask, bit + 8) & 0xFF;
    const __m128 low = _mm_castsi128_ps(load64(kPlaces8.first[first]));
    const auto* high = reinterpret_cast<const __m64*>(kPlaces8.second[second]);
    const __m128i control = _mm_castps_si128(_mm_loadh_pi(low, high));
    return _mm_shuffle_epi8(load128(around_border(p, mask, bit, first)), control);
}

// The same in 16 bits each, as Lanes::load has 16 values.
template <class Lanes>
BESA_INLINE inline __m256i expand16(const typename Lanes::Value* p, std::uint64_t mask, int bit) {
    // The bytes times 16, which is where their rows begin.
    const std::uint64_t first = rotated(mask, bit + 60) & 0xFF0;
    const std::uint64_t second = rotated(mask, bit + 4) & 0xFF0;
    const __m256i control = join(load128(kPlaces16.first[0] + first),
                                 load128(kPlaces16.second[0] + second));
    return _mm256_shuffle_epi8(Lanes::load(around_border(p, mask, bit, first)), control);
}

struct Avx2Traits : DefaultTraits {
    using Mask = std::uint64_t;
    static constexpr int kStep = 64, kBefore = 8;
    static constexpr int kAccumulators = 8, kLeastRows = 2, kUnroll = 1;
    static constexpr int kTileRows = 4, kTileTokens = 3, kTileFrom = 5;
    static constexpr int kTileBytes = 16384;
};

// int4 values. Bytes go to their places, and there their low or high nibbles become numbers times the
// step of their group, by another shuffle; a byte that is zero stays so.
struct Int4 {
    using Value = std::uint8_t;
    static constexpr int kStep = 128, kPrefetchBytes = 512;

    // Weights i * 32 to i * 32 + 31 of a step, as int8. The first 64 are of low nibbles.
    template <int i>
    BESA_INLINE static __m256i expand(const Value* p, const Value* high, NibblesMask mask,
                                      const Groups& g, std::int64_t col) {
        const Value* values = i < 2 ? p : high;
        const std::uint64_t bits = i < 2 ? mask.low : mask.high;
        const __m256i bytes = join(expand8(values, bits, i % 2 * 32),
                                   expand8(values, bits, i % 2 * 32 + 16));
        const __m256i nibbles = i < 2 ? bytes : _mm256_srli_epi16(bytes, 4);
        // What the sixteen nibbles stand for.
        const std::uint8_t step = g.steps[least((col + 32 * i) >> g.shift, g.last)];
        const __m256i numbers = _mm256_broadcastsi128_si256(load128(kNibbleSteps.of[step]));
        return _mm256_shuffle_epi8(numbers, _mm256_and_si256(nibbles, _mm256_set1_epi8(15)));
    }
};

// Sums of products in float32.
struct FloatSums : Avx2Traits {
    using Acc = __m256;
    using Sum = float;

    static Acc zero() { return _mm256_setzero_ps(); }
    static Acc add(Acc a, Acc b) { return _mm256_add_ps(a, b); }
    static Sum sum(Acc acc) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
};

// As __m256i an array of accumulators would be stored to memory in every step (GCC).
typedef std::int32_t Int32x8 __attribute__((vector_size(32)));

// Sums of products in int32.
struct Int32Sums : Avx2Traits {
    using Acc = Int32x8;
    using Sum = std::int64_t;

    static Acc zero() { return Acc{}; }
    static Acc add(Acc a, Acc b) { return a + b; }
    static Sum sum(Acc acc) {
        const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128((__m256i)acc));
        const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256((__m256i)acc, 1));
        alignas(32) std::int64_t lanes[4];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(low, high));
        return lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
};

// The scales of the first and the second 32 columns of a step, in every lane.
inline Registers<__m256, 2> scales(const Groups& g, std::int64_t col) {
    Registers<__m256, 2> scale;
    scale[0] = _mm256_set1_ps(g.scale[col >> g.shift]);
    scale[1] = _mm256_set1_ps(g.scale[least((col + 32) >> g.shift, g.last)]);
    return scale;
}

}  // namespace
}  // namespace besa
