// AVX2 with FMA (Intel since Haswell, AMD since Zen): 16-bit values expand in their own width, int8
// values in 16 bits, and float32 values by a permutation of 8.

#include "sparse_linear_avx2.h"

namespace besa {
namespace {

// How values fill registers with lanes of 16 bits, and how these become float32, two registers of one.

// bfloat16: shifting a pair of lanes left leaves the one at the even place, masking it the one at the
// odd place. An activation's even columns lie before its odd ones.
struct Bf16Lanes {
    using Value = std::uint16_t;
    static constexpr int kSplit = 16;
    static __m256i load(const Value* p) { return load256(p); }
    static void floats(__m256i lanes, __m256& first, __m256& second) {
        const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
        first = _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 16));
        second = _mm256_castsi256_ps(_mm256_and_si256(lanes, odd));
    }
};

struct Fp16Lanes {
    using Value = std::uint16_t;
    static constexpr int kSplit = 1;
    static __m256i load(const Value* p) { return load256(p); }
    static void floats(__m256i lanes, __m256& first, __m256& second) {
        first = _mm256_cvtph_ps(_mm256_castsi256_si128(lanes));
        second = _mm256_cvtph_ps(_mm256_extracti128_si256(lanes, 1));
    }
};

struct Int8Lanes {
    using Value = std::int8_t;
    static constexpr int kSplit = 1;
    static __m256i load(const Value* p) { return _mm256_cvtepi8_epi16(load128(p)); }
    static void floats(__m256i lanes, __m256& first, __m256& second) {
        first = eight(_mm256_castsi256_si128(lanes));
        second = eight(_mm256_extracti128_si256(lanes, 1));
    }
    static __m256 eight(__m128i lanes) { return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(lanes)); }
};

// Products in float32.
struct FloatProducts : FloatSums {
    using X = float;
    using W = Registers<__m256, 8>;
    static constexpr int kParts = 8;

    template <int kPart>
    BESA_INLINE static Acc dot_part(Acc acc, const W& w, const X* x) {
        return _mm256_fmadd_ps(w[kPart], _mm256_load_ps(x + 8 * kPart), acc);
    }
};

template <class Lanes, bool kGrouped = false>
struct FloatDot : FloatProducts {
    using Value = typename Lanes::Value;

    static constexpr int kSplit = Lanes::kSplit;

    BESA_INLINE static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        W w;
        each<4>([&](auto i) BESA_INLINE { put<i>(w, expand16<Lanes>(p, m, 16 * i), g, col); });
        return w;
    }
    BESA_INLINE static W load(const Value* p, const Groups& g, std::int64_t col) {
        W w;
        each<4>([&](auto i) BESA_INLINE { put<i>(w, Lanes::load(p + 16 * i), g, col); });
        return w;
    }
    template <int i>
    BESA_INLINE static void put(W& w, __m256i lanes, const Groups& g, std::int64_t col) {
        Lanes::floats(lanes, w[2 * i], w[2 * i + 1]);
        if constexpr (kGrouped) {
            const __m256 scale = scales(g, col)[i / 2];
            w[2 * i] = _mm256_mul_ps(w[2 * i], scale);
            w[2 * i + 1] = _mm256_mul_ps(w[2 * i + 1], scale);
        }
    }
};

struct Fp32Dot : FloatProducts {
    using Value = float;

    BESA_INLINE static W expand(const Value* p, Mask m, const Groups&, std::int64_t) {
        W w;
        each<8>([&](auto i) BESA_INLINE {
            // As the first of two bytes, whose values end where the next one's begin.
            const std::uint64_t byte = rotated(m, 8 * i) & 0xFF;
            const __m256i places = _mm256_cvtepi8_epi32(load64(kPlaces8.first[byte]));
            const __m256 values = _mm256_loadu_ps(around_border(p, m, 8 * i, byte));
            const __m256i none = _mm256_srai_epi32(places, 31);
            w[i] = _mm256_andnot_ps(_mm256_castsi256_ps(none),
                                    _mm256_permutevar8x32_ps(values, places));
        });
        return w;
    }
    BESA_INLINE static W load(const Value* p, const Groups&, std::int64_t) {
        W w;
        each<8>([&](auto i) BESA_INLINE { w[i] = _mm256_loadu_ps(p + 8 * i); });
        return w;
    }
};

// int8 values as 16-bit numbers. Products with an activation's are added in pairs.
using Int8Weights = Registers<__m256i, 4>;

BESA_INLINE inline Int8Weights expand_int8(const std::int8_t* p, std::uint64_t mask) {
    Int8Weights w;
    each<4>([&](auto i) BESA_INLINE { w[i] = expand16<Int8Lanes>(p, mask, 16 * i); });
    return w;
}

BESA_INLINE inline Int8Weights load_int8(const std::int8_t* p) {
    Int8Weights w;
    each<4>([&](auto i) BESA_INLINE { w[i] = Int8Lanes::load(p + 16 * i); });
    return w;
}

BESA_INLINE inline Int32x8 add_pairs(Int32x8 acc, __m256i w, const std::int16_t* x) {
    acc += (Int32x8)_mm256_madd_epi16(w, load256(x));
    asm("" : "+x"(acc));  // or GCC would add up the products first, in more registers than there are
    return acc;
}

struct Int8Dot : Int32Sums {
    using Value = std::int8_t;
    using X = std::int16_t;
    using W = Int8Weights;
    static constexpr int kParts = 4;
    static constexpr bool kInt8Input = true;

    static W expand(const Value* p, Mask m, const Groups&, std::int64_t) {
        return expand_int8(p, m);
    }
    static W load(const Value* p, const Groups&, std::int64_t) { return load_int8(p); }
    template <int kPart>
    BESA_INLINE static Acc dot_part(Acc acc, const W& w, const X* x) {
        return add_pairs(acc, w[kPart], x + 16 * kPart);
    }
};

// The same with a scale per group of columns: sums of 32 columns are scaled before they are added up.
struct Int8GroupDot : FloatSums {
    using Value = std::int8_t;
    using X = std::int16_t;
    struct W {
        Int8Weights w;
        Registers<__m256, 2> scale;
    };
    static constexpr int kParts = 2;
    static constexpr bool kInt8Input = true;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        return {expand_int8(p, m), scales(g, col)};
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return {load_int8(p), scales(g, col)};
    }
    template <int kPart>
    BESA_INLINE static Acc dot_part(Acc acc, const W& w, const X* x) {
        const __m256i sums =
            _mm256_add_epi32(_mm256_madd_epi16(w.w[2 * kPart], load256(x + 32 * kPart)),
                             _mm256_madd_epi16(w.w[2 * kPart + 1], load256(x + 32 * kPart + 16)));
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), w.scale[kPart], acc);
    }
};

// int4 values the same way: half of a register after the other.
struct Int4Dot : Int32Sums {
    using Value = std::uint8_t;
    using X = std::int16_t;
    using W = Registers<__m256i, 8>;
    static constexpr int kStep = Int4::kStep, kPrefetchBytes = Int4::kPrefetchBytes, kParts = 8;
    static constexpr bool kInt8Input = true, kNibbles = true;

    BESA_INLINE static W expand(const Value* p, const Value* high, NibblesMask mask, const Groups& g,
                                std::int64_t col) {
        W w;
        each<4>([&](auto i) BESA_INLINE {
            const __m256i bytes = Int4::expand<i>(p, high, mask, g, col);
            w[2 * i] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes));
            w[2 * i + 1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1));
        });
        return w;
    }
    template <int kPart>
    BESA_INLINE static Acc dot_part(Acc acc, const W& w, const X* x) {
        return add_pairs(acc, w[kPart], x + 16 * kPart);
    }
};

}  // namespace

int sparse_linear_avx2(const Job& job) {
    switch (job.values_dtype) {
        case kBf16: return run<FloatDot<Bf16Lanes>>(job);
        case kFp16: return run<FloatDot<Fp16Lanes>>(job);
        case kFp32: return run<Fp32Dot>(job);
    }
    if (job.values_dtype == kInt4) return run<Int4Dot>(job);
    if (job.int8_input) return job.group_size ? run<Int8GroupDot>(job) : run<Int8Dot>(job);
    return job.group_size ? run<FloatDot<Int8Lanes, true>>(job) : run<FloatDot<Int8Lanes>>(job);
}

}  // namespace besa
