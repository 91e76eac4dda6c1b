// AVX2 with AVX-VNNI (Intel since Alder Lake): int8 values expand in their own width, four products a
// lane. All else is as with AVX2.

#include "sparse_linear_avx2.h"

namespace besa {
namespace {

using Int8Weights = Registers<__m256i, 2>;

BESA_INLINE inline Int8Weights expand_int8(const std::int8_t* p, std::uint64_t mask) {
    Int8Weights w;
    each<2>([&](auto i) BESA_INLINE {
        w[i] = join(expand8(p, mask, 32 * i), expand8(p, mask, 32 * i + 16));
    });
    return w;
}

BESA_INLINE inline Int8Weights load_int8(const std::int8_t* p) {
    Int8Weights w;
    each<2>([&](auto i) BESA_INLINE { w[i] = load256(p + 32 * i); });
    return w;
}

// Sums of four products. The instruction wants one side unsigned: the activations are, with 128 added,
// and 128 times the sum of the weights is taken off again.
inline Int32x8 add_products(Int32x8 acc, __m256i w, __m256i x) {
    return (Int32x8)_mm256_dpbusd_avx_epi32((__m256i)acc, x, w);
}

constexpr int kActivationOffset = 128;

inline Int32x8 add_offsets(Int32x8 acc, __m256i w) {
    return add_products(acc, w, _mm256_set1_epi8(static_cast<char>(kActivationOffset)));
}

struct Int8Dot : Int32Sums {
    using Value = std::int8_t;
    using X = std::uint8_t;
    using W = Int8Weights;
    static constexpr int kParts = 2, kOffset = kActivationOffset;
    static constexpr bool kInt8Input = true, kOffsetAtRowEnd = true;

    static W expand(const Value* p, Mask m, const Groups&, std::int64_t) {
        return expand_int8(p, m);
    }
    static W load(const Value* p, const Groups&, std::int64_t) { return load_int8(p); }
    template <int kPart>
    BESA_INLINE static Acc dot_part(Acc acc, const W& w, const X* x) {
        return add_products(acc, w[kPart], load256(x + 32 * kPart));
    }
    BESA_INLINE static Acc add_offset(Acc acc, const W& w) {
        each<2>([&](auto i) BESA_INLINE { acc = add_offsets(acc, w[i]); });
        return acc;
    }
};

// The same with a scale per group of columns: sums of 32 columns are scaled before they are added up.
struct Int8GroupDot : FloatSums {
    using Value = std::int8_t;
    using X = std::uint8_t;
    struct W {
        Int8Weights w;
        Registers<Int32x8, 2> offset;
        Registers<__m256, 2> scale;
    };
    static constexpr int kParts = 2, kOffset = kActivationOffset;  // taken off part by part
    static constexpr bool kInt8Input = true;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        return with(expand_int8(p, m), g, col);
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return with(load_int8(p), g, col);
    }
    BESA_INLINE static W with(const Int8Weights& w, const Groups& g, std::int64_t col) {
        Registers<Int32x8, 2> offset;
        each<2>([&](auto i) BESA_INLINE { offset[i] = add_offsets(Int32x8{}, w[i]); });
        return {w, offset, scales(g, col)};
    }
    template <int kPart>
    BESA_INLINE static Acc dot_part(Acc acc, const W& w, const X* x) {
        const Int32x8 sums =
            add_products(Int32x8{}, w.w[kPart], load256(x + 32 * kPart)) - w.offset[kPart];
        return _mm256_fmadd_ps(_mm256_cvtepi32_ps((__m256i)sums), w.scale[kPart], acc);
    }
};

struct Int4Dot : Int32Sums {
    using Value = std::uint8_t;
    using X = std::uint8_t;
    using W = Registers<__m256i, 4>;
    static constexpr int kStep = Int4::kStep, kPrefetchBytes = Int4::kPrefetchBytes;
    static constexpr int kParts = 4, kOffset = kActivationOffset;
    static constexpr bool kInt8Input = true, kOffsetAtRowEnd = true, kNibbles = true;

    BESA_INLINE static W expand(const Value* p, const Value* high, NibblesMask mask, const Groups& g,
                                std::int64_t col) {
        W w;
        each<4>([&](auto i) BESA_INLINE {
            w[i] = Int4::expand<i>(p, high, mask, g, col);
        });
        return w;
    }
    template <int kPart>
    BESA_INLINE static Acc dot_part(Acc acc, const W& w, const X* x) {
        return add_products(acc, w[kPart], load256(x + 32 * kPart));
    }
    BESA_INLINE static Acc add_offset(Acc acc, const W& w) {
        each<kParts>([&](auto i) BESA_INLINE { acc = add_offsets(acc, w[i]); });
        return acc;
    }
};

}  // namespace

int sparse_linear_avx2_vnni(const Job& job) {
    if (job.values_dtype == kInt4) return run<Int4Dot>(job);
    if (job.values_dtype == kInt8 && job.int8_input)
        return job.group_size ? run<Int8GroupDot>(job) : run<Int8Dot>(job);
    return sparse_linear_avx2(job);
}

}  // namespace besa
