// NEON as every 64-bit Arm CPU has it: 8 weights a step, multiplied in float32; int8 by int8 in 16
// bits.

#include "sparse_linear_neon.h"

namespace besa {
namespace {

struct Floats {
    float32x4_t low, high;
};

struct Bf16Lanes {
    using Value = std::uint16_t;
    static Floats floats(uint16x8_t halves) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
                vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
    }
    static Floats load(const Value* p) { return floats(vld1q_u16(p)); }
    static Floats expand(const Value* p, std::uint8_t mask) { return floats(expand16(p, mask)); }
};

struct Fp16Lanes {
    using Value = std::uint16_t;
    static Floats floats(uint16x8_t bits) {
        const float16x8_t halves = vreinterpretq_f16_u16(bits);
        return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
    }
    static Floats load(const Value* p) { return floats(vld1q_u16(p)); }
    static Floats expand(const Value* p, std::uint8_t mask) { return floats(expand16(p, mask)); }
};

struct Fp32Lanes {
    using Value = float;
    static Floats load(const Value* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    static Floats expand(const Value* p, std::uint8_t mask) {
        const std::uint8_t low = mask & 0xF, high = mask >> 4;
        return {expand32(p, low), expand32(p + kCounts.of[low], high)};
    }
};

struct Int8Lanes {
    using Value = std::int8_t;
    static Floats floats(int8x8_t bytes) {
        const int16x8_t wide = vmovl_s8(bytes);
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))};
    }
    static Floats load(const Value* p) { return floats(vld1_s8(p)); }
    static Floats expand(const Value* p, std::uint8_t mask) { return floats(expand8(p, mask)); }
};

template <class Lanes, bool kGrouped = false>
struct FloatDot : FloatSums {
    using Value = typename Lanes::Value;
    using X = float;
    using Mask = std::uint8_t;
    using W = Floats;
    static constexpr int kStep = 8, kUnroll = 2, kAccumulators = 16;
    static constexpr int kTileRows = 4, kTileTokens = 4;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        return scaled(Lanes::expand(p, m), g, col);
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return scaled(Lanes::load(p), g, col);
    }
    static W scaled(const W& w, const Groups& g, std::int64_t col) {
        if constexpr (!kGrouped) return w;
        const float scale = g.scale[col >> g.shift];
        return {vmulq_n_f32(w.low, scale), vmulq_n_f32(w.high, scale)};
    }
    static Acc dot(Acc acc, const W& w, const X* x) {
        return vfmaq_f32(vfmaq_f32(acc, w.low, vld1q_f32(x)), w.high, vld1q_f32(x + 4));
    }
};

// Two products of int8 fit in 16 bits, as no activation is -128.
struct Products {
    static int32x4_t add(int32x4_t sums, int8x16_t w, int8x16_t x) {
        const int16x8_t products = vmull_s8(vget_low_s8(w), vget_low_s8(x));
        return vpadalq_s16(sums, vmlal_high_s8(products, w, x));
    }
};

}  // namespace

int sparse_linear_neon(const Job& job) {
    switch (job.values_dtype) {
        case kBf16: return run<FloatDot<Bf16Lanes>>(job);
        case kFp16: return run<FloatDot<Fp16Lanes>>(job);
        case kFp32: return run<FloatDot<Fp32Lanes>>(job);
    }
    if (job.int8_input) return run_int8<Products>(job);
    return job.group_size ? run<FloatDot<Int8Lanes, true>>(job) : run<FloatDot<Int8Lanes>>(job);
}

}  // namespace besa
