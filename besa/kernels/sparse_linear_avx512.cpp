// AVX-512 without BF16 and VBMI2 (Intel since Skylake-X): values are widened to 32 bits and expand
// there, 16 a step.

#include "sparse_linear_avx512.h"

#include <type_traits>

namespace besa {
namespace {

// int8 values and activations. Both are 16-bit numbers in 32-bit lanes, the upper half of the
// activation's being zero, so that one multiply-add of pairs is a product that cannot overflow.
template <bool kGrouped>
struct Int8Pairs : std::conditional_t<kGrouped, FloatSums, Int32Sums> {
    using Acc = std::conditional_t<kGrouped, __m512, Int32x16>;
    using Value = std::int8_t;
    using X = std::int32_t;
    using Mask = std::uint16_t;
    struct W {
        __m512i w;
        __m512 scale;
    };
    static constexpr int kStep = 16, kAccumulators = kGrouped ? 12 : 24;
    static constexpr int kTileRows = 4, kTileTokens = 2;
    static constexpr bool kInt8Input = true, kSumsOf8 = false;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        return with(_mm512_mask_expand_epi32(fresh_zero(), m, Int8Lanes::load(p)), g, col);
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return with(Int8Lanes::load(p), g, col);
    }
    static W with(__m512i w, const Groups& g, std::int64_t col) {
        return {w, kGrouped ? _mm512_set1_ps(g.scale[col >> g.shift]) : _mm512_setzero_ps()};
    }
    static Acc dot(Acc acc, const W& w, const X* x) {
        // The activation's sign would fill its upper half.
        const __m512i low = _mm512_and_si512(_mm512_load_si512(x), _mm512_set1_epi32(0xFFFF));
        const __m512i products = _mm512_madd_epi16(w.w, low);
        if constexpr (kGrouped)
            return _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), w.scale, acc);
        else
            return acc + (Acc)products;
    }
};

}  // namespace

int sparse_linear_avx512(const Job& job) {
    if (job.values_dtype == kInt8 && job.int8_input)
        return job.group_size ? run<Int8Pairs<true>>(job) : run<Int8Pairs<false>>(job);
    return run_float(job);
}

}  // namespace besa
