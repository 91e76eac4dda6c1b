// Traits for Arm's NEON of any kind: weights are put in their places by a shuffle of bytes (tbl), by
// a table with an entry for each mask.

#pragma once

#include <arm_neon.h>

#include <type_traits>

#include "run.h"

namespace besa {
namespace {

// For each mask of kWeights weights, the byte of the values that goes to each byte of theirs; 0xFF
// is past all values and leaves a zero.
template <int kWeights, int kBytes>
struct Places {
    alignas(64) std::uint8_t of[1 << kWeights][kWeights * kBytes];

    constexpr Places() : of() {
        for (int mask = 0; mask < 1 << kWeights; ++mask)
            for (int i = 0, next = 0; i < kWeights * kBytes; ++i)
                of[mask][i] = mask >> i / kBytes & 1 ? static_cast<std::uint8_t>(next++)
                                                     : std::uint8_t{0xFF};
    }
};

constexpr Places<8, 1> kPlaces8;
constexpr Places<8, 2> kPlaces16;
constexpr Places<4, 4> kPlaces32;

struct Counts {
    std::uint8_t of[256];

    constexpr Counts() : of() {
        for (int mask = 1; mask < 256; ++mask)
            of[mask] = static_cast<std::uint8_t>(of[mask >> 1] + (mask & 1));
    }
};

constexpr Counts kCounts;

template <class Mask>
std::uint8_t byte(Mask mask, int i) {
    return static_cast<std::uint8_t>(mask >> 8 * i);
}

inline int8x8_t expand8(const std::int8_t* p, std::uint8_t mask) {
    return vtbl1_s8(vld1_s8(p), vreinterpret_s8_u8(vld1_u8(kPlaces8.of[mask])));
}

inline uint16x8_t expand16(const std::uint16_t* p, std::uint8_t mask) {
    const uint8x16_t values = vreinterpretq_u8_u16(vld1q_u16(p));
    return vreinterpretq_u16_u8(vqtbl1q_u8(values, vld1q_u8(kPlaces16.of[mask])));
}

// Of float32, 4 fill a register.
inline float32x4_t expand32(const float* p, std::uint8_t mask) {
    const uint8x16_t values = vreinterpretq_u8_f32(vld1q_f32(p));
    return vreinterpretq_f32_u8(vqtbl1q_u8(values, vld1q_u8(kPlaces32.of[mask])));
}

struct NeonTraits : DefaultTraits {
    // Only vectors have an instruction for it, and the way there and back takes longer than a load.
    template <class Mask>
    static int count(Mask mask) {
        int sum = 0;
        each<sizeof(Mask)>([&](auto i) BESA_INLINE { sum += kCounts.of[byte(mask, i)]; });
        return sum;
    }
};

// Sums of products in float32.
struct FloatSums : NeonTraits {
    using Acc = float32x4_t;
    using Sum = float;
    static constexpr bool kSumsOf8 = true;

    static Acc zero() { return vdupq_n_f32(0); }
    static Acc add(Acc a, Acc b) { return vaddq_f32(a, b); }
    static Sum sum(Acc acc) { return vaddvq_f32(acc); }
    BESA_INLINE static void add_sums(const Acc* acc, Sum* to) {
        each<2>([&](auto i) BESA_INLINE {
            const Acc* four = acc + 4 * i;
            const Acc sums = vpaddq_f32(vpaddq_f32(four[0], four[1]), vpaddq_f32(four[2], four[3]));
            vst1q_f32(to + 4 * i, vaddq_f32(vld1q_f32(to + 4 * i), sums));
        });
    }
};

// Sums of products in int32.
struct Int32Sums : NeonTraits {
    using Acc = int32x4_t;
    using Sum = std::int64_t;

    static Acc zero() { return vdupq_n_s32(0); }
    static Acc add(Acc a, Acc b) { return vaddq_s32(a, b); }
    static Sum sum(Acc acc) { return vaddlvq_s32(acc); }
};

// int8 values and activations, 32 a step. `Products` says how 16 of them are multiplied and added
// to sums in int32.
template <class Products, bool kGrouped>
struct Int8Dot : std::conditional_t<kGrouped, FloatSums, Int32Sums> {
    using NeonTraits::count;
    using Acc = std::conditional_t<kGrouped, float32x4_t, int32x4_t>;
    using Value = std::int8_t;
    using X = std::int8_t;
    using Mask = std::uint32_t;
    struct W {
        int8x16_t low, high;
        float scale;
    };
    static constexpr int kStep = 32, kUnroll = 1, kAccumulators = 16;
    static constexpr int kTileRows = 4, kTileTokens = 4;
    static constexpr bool kInt8Input = true;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        int8x8_t part[4];
        each<4>([&](auto i) BESA_INLINE {
            part[i] = expand8(p, byte(m, i));
            p += count(byte(m, i));
        });
        return {vcombine_s8(part[0], part[1]), vcombine_s8(part[2], part[3]), scale(g, col)};
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        return {vld1q_s8(p), vld1q_s8(p + 16), scale(g, col)};
    }
    static float scale(const Groups& g, std::int64_t col) {
        return kGrouped ? g.scale[col >> g.shift] : 1;
    }
    static Acc dot(Acc acc, const W& w, const X* x) {
        if constexpr (kGrouped) {
            const int32x4_t sums = add_products(vdupq_n_s32(0), w, x);
            return vfmaq_n_f32(acc, vcvtq_f32_s32(sums), w.scale);
        } else {
            return add_products(acc, w, x);
        }
    }
    static int32x4_t add_products(int32x4_t sums, const W& w, const X* x) {
        sums = Products::add(sums, w.low, vld1q_s8(x));
        return Products::add(sums, w.high, vld1q_s8(x + 16));
    }
};

template <class Products>
int run_int8(const Job& job) {
    return job.group_size ? run<Int8Dot<Products, true>>(job) : run<Int8Dot<Products, false>>(job);
}

}  // namespace
}  // namespace besa
