// AVX2 with FMA: 8 weights a step, put in their places by a byte shuffle or a permutation from a
// table with an entry for each mask.

#include <immintrin.h>

#include <type_traits>

#include "run.h"

namespace besa {
namespace {

// For each mask of 8 weights, the value that goes to each place; a number with the top bit set
// stands for none.
struct Places {
    alignas(64) std::uint8_t of[256][8];

    constexpr Places() : of() {
        for (int mask = 0; mask < 256; ++mask)
            for (int place = 0, next = 0; place < 8; ++place)
                of[mask][place] =
                    mask >> place & 1 ? static_cast<std::uint8_t>(next++) : std::uint8_t{0x80};
    }
};

constexpr Places kPlaces;

inline __m128i places(std::uint8_t mask) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.of[mask]));
}

// 16-bit values, expanded in 16 bits.
inline __m128i expand16(const std::uint16_t* p, std::uint8_t mask) {
    const __m128i low = _mm_slli_epi16(_mm_cvtepu8_epi16(places(mask)), 1);  // 2i in each place
    const __m128i pairs = _mm_or_si128(low, _mm_slli_epi16(_mm_add_epi16(low, _mm_set1_epi16(1)), 8));
    // Of 0x80 the shift leaves 0x100: its place must be empty.
    const __m128i none = _mm_cmpgt_epi16(low, _mm_set1_epi16(0xFF));
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_shuffle_epi8(values, _mm_or_si128(pairs, none));
}

struct Bf16Lanes {
    using Value = std::uint16_t;
    static __m256 floats(__m128i halves) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static __m256 load(const Value* p) {
        return floats(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static __m256 expand(const Value* p, std::uint8_t mask) { return floats(expand16(p, mask)); }
};

struct Fp16Lanes {
    using Value = std::uint16_t;
    static __m256 load(const Value* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static __m256 expand(const Value* p, std::uint8_t mask) {
        return _mm256_cvtph_ps(expand16(p, mask));
    }
};

struct Fp32Lanes {
    using Value = float;
    static __m256 load(const Value* p) { return _mm256_loadu_ps(p); }
    static __m256 expand(const Value* p, std::uint8_t mask) {
        const __m256i index = _mm256_cvtepi8_epi32(places(mask));
        const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index);
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), moved);
    }
};

inline __m128i load_bytes(const std::int8_t* p) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}

inline __m128i expand_bytes(const std::int8_t* p, std::uint8_t mask) {
    return _mm_shuffle_epi8(load_bytes(p), places(mask));
}

struct Int8Lanes {
    using Value = std::int8_t;
    static __m256 floats(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
    static __m256 load(const Value* p) { return floats(load_bytes(p)); }
    static __m256 expand(const Value* p, std::uint8_t mask) { return floats(expand_bytes(p, mask)); }
};

// Sums of products in float32.
struct FloatSums : DefaultTraits {
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
struct Int32Sums : DefaultTraits {
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

template <class Lanes, bool kGrouped = false>
struct FloatDot : FloatSums {
    using Value = typename Lanes::Value;
    using X = float;
    using Mask = std::uint8_t;
    using W = __m256;
    static constexpr int kStep = 8, kAccumulators = 8;
    static constexpr int kTileRows = 4, kTileTokens = 2;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        return scaled(Lanes::expand(p, m), g, col);
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return scaled(Lanes::load(p), g, col);
    }
    static W scaled(__m256 w, const Groups& g, std::int64_t col) {
        return kGrouped ? _mm256_mul_ps(w, _mm256_set1_ps(g.scale[col >> g.shift])) : w;
    }
    static Acc dot(Acc acc, W w, const X* x) { return _mm256_fmadd_ps(w, _mm256_load_ps(x), acc); }
};

// int8 values and activations as 16-bit numbers, whose products are added in pairs.
template <bool kGrouped>
struct Int8Pairs : std::conditional_t<kGrouped, FloatSums, Int32Sums> {
    using Acc = std::conditional_t<kGrouped, __m256, Int32x8>;
    using Value = std::int8_t;
    using X = std::int16_t;
    using Mask = std::uint16_t;
    struct W {
        __m256i w;
        __m256 scale;
    };
    static constexpr int kStep = 16, kAccumulators = 8;
    static constexpr int kTileRows = 4, kTileTokens = 2;
    static constexpr bool kInt8Input = true;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        const std::uint8_t low = static_cast<std::uint8_t>(m), high = m >> 8;
        const __m128i second = expand_bytes(p + __builtin_popcount(low), high);
        return with(_mm_unpacklo_epi64(expand_bytes(p, low), second), g, col);
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return with(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), g, col);
    }
    static W with(__m128i bytes, const Groups& g, std::int64_t col) {
        return {_mm256_cvtepi8_epi16(bytes),
                kGrouped ? _mm256_set1_ps(g.scale[col >> g.shift]) : _mm256_setzero_ps()};
    }
    static Acc dot(Acc acc, const W& w, const X* x) {
        const __m256i products =
            _mm256_madd_epi16(w.w, _mm256_load_si256(reinterpret_cast<const __m256i*>(x)));
        if constexpr (kGrouped)
            return _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), w.scale, acc);
        else
            return acc + (Acc)products;
    }
};

}  // namespace

int sparse_linear_avx2(const Job& job) {
    switch (job.values_dtype) {
        case kBf16: return run<FloatDot<Bf16Lanes>>(job);
        case kFp16: return run<FloatDot<Fp16Lanes>>(job);
        case kFp32: return run<FloatDot<Fp32Lanes>>(job);
    }
    if (job.int8_input)
        return job.group_size ? run<Int8Pairs<true>>(job) : run<Int8Pairs<false>>(job);
    return job.group_size ? run<FloatDot<Int8Lanes, true>>(job) : run<FloatDot<Int8Lanes>>(job);
}

}  // namespace besa
