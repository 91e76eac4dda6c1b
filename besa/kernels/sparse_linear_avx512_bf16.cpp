// AVX-512 with VBMI2, BF16 and VNNI. The traits that AMX takes, too, are in the header.

#include "sparse_linear_avx512_bf16.h"

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
