// NEON with products of bfloat16 and float16 (Arm since Neoverse V1 and N2, Apple since M2):
// activations of the values' own type are multiplied without widening either.

#include "sparse_linear_neon.h"

namespace besa {
namespace {

// 16 values a step. `Products` says how 8 of them are multiplied and added to sums in float32.
template <class Products>
struct HalfDot : FloatSums {
    using Value = std::uint16_t;
    using X = std::uint16_t;
    using Mask = std::uint16_t;
    struct W {
        uint16x8_t low, high;
    };
    static constexpr int kStep = 16, kUnroll = 2, kAccumulators = 16;
    static constexpr int kTileRows = 4, kTileTokens = 4;
    static constexpr bool kRawInput = true;

    static W expand(const Value* p, Mask m, const Groups&, std::int64_t) {
        return {expand16(p, byte(m, 0)), expand16(p + count(byte(m, 0)), byte(m, 1))};
    }
    static W load(const Value* p, const Groups&, std::int64_t) {
        return {vld1q_u16(p), vld1q_u16(p + 8)};
    }
    static Acc dot(Acc acc, const W& w, const X* x) {
        return Products::add(Products::add(acc, w.low, vld1q_u16(x)), w.high, vld1q_u16(x + 8));
    }
};

// Two products a lane, which take subnormal numbers for zero.
struct Bf16Products {
    static float32x4_t add(float32x4_t sums, uint16x8_t w, uint16x8_t x) {
        return vbfdotq_f32(sums, vreinterpretq_bf16_u16(w), vreinterpretq_bf16_u16(x));
    }
};

struct Fp16Products {
    static float32x4_t add(float32x4_t sums, uint16x8_t w, uint16x8_t x) {
        const float16x8_t a = vreinterpretq_f16_u16(w), b = vreinterpretq_f16_u16(x);
        return vfmlalq_high_f16(vfmlalq_low_f16(sums, a, b), a, b);
    }
};

}  // namespace

int sparse_linear_neon_bf16(const Job& job) {
    if (job.input_dtype == job.values_dtype) {
        if (job.values_dtype == kBf16) return run<HalfDot<Bf16Products>>(job);
        if (job.values_dtype == kFp16) return run<HalfDot<Fp16Products>>(job);
    }
    return sparse_linear_neon_dot(job);
}

}  // namespace besa
