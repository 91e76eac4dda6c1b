// Traits for AVX-512 of any kind: float32 products, 16 a step.

#pragma once

#include <immintrin.h>

#include "run.h"

namespace besa {
namespace {

// Accumulators that hold int32 say so: as __m512i, which is 64-bit lanes to GCC, an array of them is
// stored to memory in every step.
typedef std::int32_t Int32x16 __attribute__((vector_size(64)));

// A zero that the compiler does not know to be one, to expand into. AMD's Zen 4 takes the register
// that is expanded into for an operand even where zeros fill it up, and waits five cycles for
// whatever was in it before; one that has just been made zero has no before.
BESA_INLINE inline __m512i fresh_zero() {
    __m512i zero = _mm512_setzero_si512();
    asm("" : "+v"(zero));
    return zero;
}

// Values in a register: from memory they would be expanded slower.
BESA_INLINE inline __m512i in_register(const void* p) {
    __m512i values = _mm512_loadu_si512(p);
    asm("" : "+v"(values));
    return values;
}

// The sums over the lanes of 8 registers of float32 or int32: each step adds two registers' halves
// into one register. `V` says how to add; to move lanes, what they hold does not matter.
template <class V>
BESA_INLINE inline __m256 sum_8(const V* from) {
    V a[4], b[2];
    each<4>([&](auto i) BESA_INLINE {
        const __m512 one = (__m512)from[2 * i], other = (__m512)from[2 * i + 1];
        a[i] = (V)_mm512_unpacklo_ps(one, other) + (V)_mm512_unpackhi_ps(one, other);
    });
    // Of each 128 bits: sums of registers 2i, 2i + 1, 2i, 2i + 1.
    each<2>([&](auto i) BESA_INLINE {
        const __m512d one = (__m512d)a[2 * i], other = (__m512d)a[2 * i + 1];
        b[i] = (V)_mm512_unpacklo_pd(one, other) + (V)_mm512_unpackhi_pd(one, other);
    });
    // Of each 128 bits: registers 4i to 4i + 3. What is left is to add up the four parts.
    const auto halved = [](V x, V y) BESA_INLINE {
        const __m512 one = (__m512)x, other = (__m512)y;
        return (V)_mm512_shuffle_f32x4(one, other, 0x88) + (V)_mm512_shuffle_f32x4(one, other, 0xDD);
    };
    const V c = halved(b[0], b[1]);
    return _mm512_castps512_ps256((__m512)halved(c, c));
}

// Sums of products in float32.
struct FloatSums : DefaultTraits {
    using Acc = __m512;
    using Sum = float;
    static constexpr bool kSumsOf8 = true;

    static Acc zero() { return _mm512_setzero_ps(); }
    static Acc add(Acc a, Acc b) { return _mm512_add_ps(a, b); }
    static Sum sum(Acc acc) { return _mm512_reduce_add_ps(acc); }
    BESA_INLINE static void add_sums(const Acc* acc, Sum* to) {
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum_8(acc)));
    }
};

// Sums of products in int32.
struct Int32Sums : DefaultTraits {
    using Acc = Int32x16;
    using Sum = std::int64_t;
    static constexpr bool kSumsOf8 = true;

    static Acc zero() { return Acc{}; }
    static Acc add(Acc a, Acc b) { return a + b; }
    static Sum sum(Acc acc) {
        const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256((__m512i)acc));
        const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64((__m512i)acc, 1));
        return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
    }
    // A tile has few columns enough that its sums are int32.
    BESA_INLINE static void add_sums(const Acc* acc, Sum* to) {
        _mm512_storeu_si512(
            to, _mm512_add_epi64(_mm512_loadu_si512(to), _mm512_cvtepi32_epi64((__m256i)sum_8(acc))));
    }
};

// How each value type becomes float32 lanes: 16 of them, whatever is in memory.
struct Bf16Lanes {
    using Value = std::uint16_t;
    static __m512i load(const Value* p) {
        return _mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
    }
    static __m512 floats(__m512i lanes) { return _mm512_castsi512_ps(lanes); }
};

struct Fp16Lanes {
    using Value = std::uint16_t;
    static __m512i load(const Value* p) {
        return _mm512_castps_si512(
            _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    }
    static __m512 floats(__m512i lanes) { return _mm512_castsi512_ps(lanes); }
};

struct Fp32Lanes {
    using Value = float;
    static __m512i load(const Value* p) { return _mm512_loadu_si512(p); }
    static __m512 floats(__m512i lanes) { return _mm512_castsi512_ps(lanes); }
};

struct Int8Lanes {
    using Value = std::int8_t;
    static __m512i load(const Value* p) {
        return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static __m512 floats(__m512i lanes) { return _mm512_cvtepi32_ps(lanes); }
};

template <class Lanes, bool kGrouped = false>
struct FloatDot : FloatSums {
    using Value = typename Lanes::Value;
    using X = float;
    using Mask = std::uint16_t;
    using W = __m512;
    static constexpr int kStep = 16, kAccumulators = 24;
    static constexpr int kTileRows = 6, kTileTokens = 4;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        return scaled(_mm512_mask_expand_epi32(fresh_zero(), m, Lanes::load(p)), g, col);
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return scaled(Lanes::load(p), g, col);
    }
    static W scaled(__m512i lanes, const Groups& g, std::int64_t col) {
        const __m512 w = Lanes::floats(lanes);
        return kGrouped ? _mm512_mul_ps(w, _mm512_set1_ps(g.scale[col >> g.shift])) : w;
    }
    static Acc dot(Acc acc, W w, const X* x) {
        return _mm512_fmadd_ps(w, _mm512_load_ps(x), acc);
    }
};

inline int run_float(const Job& job) {
    switch (job.values_dtype) {
        case kBf16: return run<FloatDot<Bf16Lanes>>(job);
        case kFp16: return run<FloatDot<Fp16Lanes>>(job);
        case kFp32: return run<FloatDot<Fp32Lanes>>(job);
        default:
            return job.group_size ? run<FloatDot<Int8Lanes, true>>(job)
                                  : run<FloatDot<Int8Lanes>>(job);
    }
}

}  // namespace
}  // namespace besa
