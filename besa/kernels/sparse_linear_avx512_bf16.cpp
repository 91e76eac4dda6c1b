// AVX-512 with VBMI2, BF16 and VNNI (Intel since Cooper and Ice Lake's successors, AMD since Zen 4):
// values expand in their own width, two or four products a lane and instruction.

#include "sparse_linear_avx512.h"

namespace besa {
namespace {

// bfloat16 values as float32, in two halves: shifting a pair of them left leaves the one at the even
// place, masking it the one at the odd place. An activation's even columns lie before its odd ones.
// On Intel's cores this is twice as fast as `Bf16Pairs`.
struct Bf16Halves : FloatSums {
    using Value = std::uint16_t;
    using X = float;
    using Mask = std::uint32_t;
    struct W {
        __m512 even, odd;
    };
    static constexpr int kStep = 32, kSplit = 32, kAccumulators = 24;
    static constexpr int kTileRows = 6, kTileTokens = 4;

    static W expand(const Value* p, Mask m, const Groups&, std::int64_t) {
        return halves(_mm512_mask_expand_epi16(fresh_zero(), m, in_register(p)));
    }
    static W load(const Value* p, const Groups&, std::int64_t) {
        return halves(_mm512_loadu_si512(p));
    }
    static W halves(__m512i pairs) {
        const __m512i odd = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_castsi512_ps(odd)};
    }
    static Acc dot(Acc acc, const W& w, const X* x) {
        acc = _mm512_fmadd_ps(w.even, _mm512_load_ps(x), acc);
        return _mm512_fmadd_ps(w.odd, _mm512_load_ps(x + 16), acc);
    }
};

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

// The same with a scale per group of columns: a step's sums are scaled before they are added up.
struct Int8GroupDot : FloatSums {
    using Value = std::int8_t;
    using X = std::uint8_t;
    using Mask = std::uint64_t;
    struct W {
        __m512i w, offset;
        __m512 scale;
    };
    static constexpr int kStep = 64, kUnroll = 2, kAccumulators = 12;
    static constexpr int kTileRows = 4, kTileTokens = 2;
    static constexpr int kOffset = 128;  // taken off step by step
    static constexpr bool kInt8Input = true;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        return with(_mm512_mask_expand_epi8(fresh_zero(), m, in_register(p)), g, col);
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return with(_mm512_loadu_si512(p), g, col);
    }
    static W with(__m512i w, const Groups& g, std::int64_t col) {
        // 64 columns are 16 lanes: one group, or two of 8 lanes.
        const float low = g.scale[least(col >> g.shift, g.last)];
        const float high = g.scale[least((col + 32) >> g.shift, g.last)];
        const __m512i offset =
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(static_cast<char>(kOffset)), w);
        return {w, offset, _mm512_mask_mov_ps(_mm512_set1_ps(low), 0xFF00, _mm512_set1_ps(high))};
    }
    static Acc dot(Acc acc, const W& w, const X* x) {
        const __m512i sums =
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_load_si512(x), w.w);
        return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, w.offset)), w.scale, acc);
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

int sparse_linear_avx512_bf16(const Job& job) {
    if (job.values_dtype == kBf16) return run<Bf16Halves>(job);
    if (job.values_dtype == kInt4 && job.int8_input)
        switch (job.step_size) {
            case 32: return run<Int4Dot<32>>(job);
            case 64: return run<Int4Dot<64>>(job);
            case 128: return run<Int4Dot<128>>(job);
            default: return run<Int4Dot<0>>(job);
        }
    if (job.values_dtype == kInt8 && job.int8_input)
        return job.group_size ? run<Int8GroupDot>(job) : run<Int8Dot>(job);
    return run_float(job);
}

int sparse_linear_avx512_dpbf16(const Job& job) {
    if (job.values_dtype == kBf16 && job.input_dtype == kBf16) return run<Bf16Pairs>(job);
    return sparse_linear_avx512_bf16(job);
}

}  // namespace besa
