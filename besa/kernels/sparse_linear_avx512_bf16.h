// Traits for AVX-512 with VBMI2, BF16 and VNNI (Intel since Cooper and Ice Lake's successors, AMD since
// Zen 4): values expand in their own width, two or four products a lane and instruction.

#pragma once

#include "sparse_linear_avx512.h"

namespace besa {
namespace {

// bfloat16 values and activations, two products a lane and instruction (dpbf16ps), which takes
// subnormal numbers for zero. On AMD's cores this is twice as fast as `Bf16Halves`.
struct Bf16Pairs : FloatSums {
    using Value = std::uint16_t;
    using X = std::uint16_t;
    using Mask = std::uint32_t;
    using W = __m512i;
    static constexpr int kStep = 32, kAccumulators = 24;
    static constexpr int kTileRows = 6, kTileTokens = 4;
    static constexpr bool kRawInput = true;

    static W expand(const Value* p, Mask m, const Groups&, std::int64_t) {
        return _mm512_mask_expand_epi16(fresh_zero(), m, in_register(p));
    }
    static W load(const Value* p, const Groups&, std::int64_t) { return _mm512_loadu_si512(p); }
    static Acc dot(Acc acc, W w, const X* x) {
        return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_load_si512(x));
    }
};

// int8 values and activations, four products a lane. The instruction wants one side unsigned: the
// activations are, with 128 added, and 128 times the sum of the weights is taken off again.
struct Int8Dot : Int32Sums {
    using Value = std::int8_t;
    using X = std::uint8_t;
    using Mask = std::uint64_t;
    using W = __m512i;
    static constexpr int kStep = 64, kAccumulators = 20;
    static constexpr int kTileRows = 6, kTileTokens = 4, kTileFrom = 8;
    static constexpr int kOffset = 128;
    static constexpr bool kInt8Input = true, kOffsetAtRowEnd = true;

    static W expand(const Value* p, Mask m, const Groups&, std::int64_t) {
        return _mm512_mask_expand_epi8(fresh_zero(), m, in_register(p));
    }
    static W load(const Value* p, const Groups&, std::int64_t) { return _mm512_loadu_si512(p); }
    static Acc dot(Acc acc, W w, const X* x) {
        return (Acc)_mm512_dpbusd_epi32((__m512i)acc, _mm512_load_si512(x), w);
    }
    static Acc add_offset(Acc acc, W w) {
        return (Acc)_mm512_dpbusd_epi32((__m512i)acc,
                                        _mm512_set1_epi8(static_cast<char>(kOffset)), w);
    }
};

// int4 values: 64 low nibbles and 64 high ones a step, expanded and then made int8 by a table of 16
// for the step of their group. The rest is as in Int8Dot. kGroup is the columns of a group; 0 is a
// whole row.
template <int kGroup>
struct Int4Dot : Int32Sums {
    using Value = std::uint8_t;
    using X = std::uint8_t;
    using Mask = std::uint64_t;
    struct W {
        __m512i low, high;
    };
    static constexpr int kStep = 128, kUnroll = 2, kAccumulators = 20;
    static constexpr int kTileRows = 6, kTileTokens = 4, kTileFrom = 8;
    static constexpr int kOffset = 128;
    static constexpr int kPrefetchBytes = 512;  // a row of 4096 columns has a thousand
    static constexpr bool kInt8Input = true, kOffsetAtRowEnd = true, kNibbles = true;

    static W expand(const Value* p, const Value* high, NibblesMask mask, const Groups& g,
                    std::int64_t col) {
        const __m512i all = _mm512_set1_epi8(15);
        const __m512i lows = _mm512_and_si512(_mm512_loadu_si512(p), all);
        const __m512i highs =
            _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(high), 4), all);
        const __m512i first = table(g, col);
        const __m512i second = kGroup == 32 || kGroup == 64 ? table(g, col + 64) : first;
        return {_mm512_shuffle_epi8(first,
                                    _mm512_mask_expand_epi8(fresh_zero(), mask.low, lows)),
                _mm512_shuffle_epi8(second,
                                    _mm512_mask_expand_epi8(fresh_zero(), mask.high, highs))};
    }
    // For 64 columns from `col` on, or as many as a group has: the table once for each 16 of them.
    static __m512i table(const Groups& g, std::int64_t col) {
        if constexpr (kGroup == 0) return steps(g, 0);
        if constexpr (kGroup == 128) return steps(g, col / kStep);
        const std::int64_t group = least(col / (kGroup ? kGroup : 1), g.last);
        if constexpr (kGroup == 64) return steps(g, group);
        return _mm512_mask_mov_epi64(steps(g, group), 0xF0, steps(g, least(group + 1, g.last)));
    }
    static __m512i steps(const Groups& g, std::int64_t group) {
        return _mm512_broadcast_i32x4(
            _mm_load_si128(reinterpret_cast<const __m128i*>(kNibbleSteps.of[g.steps[group]])));
    }
    static Acc dot(Acc acc, const W& w, const X* x) {
        return both(acc, w, _mm512_load_si512(x), _mm512_load_si512(x + 64));
    }
    static Acc add_offset(Acc acc, const W& w) {
        const __m512i offset = _mm512_set1_epi8(static_cast<char>(kOffset));
        return both(acc, w, offset, offset);
    }
    static Acc both(Acc acc, const W& w, __m512i low, __m512i high) {
        const __m512i sums = _mm512_dpbusd_epi32((__m512i)acc, low, w.low);
        return (Acc)_mm512_dpbusd_epi32(sums, high, w.high);
    }
};

}  // namespace
}  // namespace besa
