// Plain C++ for any CPU. Lanes are small arrays, which compilers turn into whatever vectors the
// target has.

#include <type_traits>

#include "run.h"

namespace besa {
namespace {

constexpr int kLanes = 8;

struct Bf16Value {
    using Value = std::uint16_t;
    static float get(Value value) { return bf16_to_float(value); }
};

struct Fp16Value {
    using Value = std::uint16_t;
    static float get(Value value) { return fp16_to_float(value); }
};

template <class T>
struct PlainValue {
    using Value = T;
    static float get(Value value) { return static_cast<float>(value); }
};

// Products and sums of T (float, or int32 for int8 values and activations).
template <class Get, class T, class Activation, class Total, bool kInt8, bool kGrouped>
struct Lanes : DefaultTraits {
    using Value = typename Get::Value;
    using X = Activation;
    using Mask = std::uint8_t;
    struct W {
        T of[kLanes];
        float scale;
    };
    struct Acc {
        std::conditional_t<kGrouped, float, T> of[kLanes];
    };
    using Sum = std::conditional_t<kGrouped, float, Total>;
    static constexpr int kStep = kLanes, kUnroll = 2, kAccumulators = 8;
    static constexpr int kTileRows = 2, kTileTokens = 2;
    static constexpr bool kInt8Input = kInt8;

    static W expand(const Value* p, Mask m, const Groups& g, std::int64_t col) {
        W w;
        for (int i = 0; i < kLanes; ++i) {
            const int bit = m >> i & 1;
            const T value = static_cast<T>(Get::get(*p));
            w.of[i] = bit ? value : T{0};
            p += bit;
        }
        w.scale = scale(g, col);
        return w;
    }
    static W load(const Value* p, const Groups& g, std::int64_t col) {
        W w;
        for (int i = 0; i < kLanes; ++i) w.of[i] = static_cast<T>(Get::get(p[i]));
        w.scale = scale(g, col);
        return w;
    }
    static float scale(const Groups& g, std::int64_t col) {
        return kGrouped ? g.scale[col >> g.shift] : 1;
    }
    static Acc zero() { return {}; }
    static Acc dot(Acc acc, const W& w, const X* x) {
        for (int i = 0; i < kLanes; ++i) {
            const T product = w.of[i] * static_cast<T>(x[i]);
            if constexpr (kGrouped)
                acc.of[i] += static_cast<float>(product) * w.scale;
            else
                acc.of[i] += product;
        }
        return acc;
    }
    static Acc add(Acc a, const Acc& b) {
        for (int i = 0; i < kLanes; ++i) a.of[i] += b.of[i];
        return a;
    }
    static Sum sum(const Acc& acc) {
        Sum total = 0;
        for (int i = 0; i < kLanes; ++i) total += acc.of[i];
        return total;
    }
};

template <class Get, bool kGrouped = false>
using FloatDot = Lanes<Get, float, float, float, false, kGrouped>;

template <bool kGrouped>
using Int8Dot = Lanes<PlainValue<std::int8_t>, std::int32_t, std::int8_t, std::int64_t, true, kGrouped>;

}  // namespace

int sparse_linear_portable(const Job& job) {
    switch (job.values_dtype) {
        case kBf16: return run<FloatDot<Bf16Value>>(job);
        case kFp16: return run<FloatDot<Fp16Value>>(job);
        case kFp32: return run<FloatDot<PlainValue<float>>>(job);
    }
    if (job.int8_input)
        return job.group_size ? run<Int8Dot<true>>(job) : run<Int8Dot<false>>(job);
    return job.group_size ? run<FloatDot<PlainValue<std::int8_t>, true>>(job)
                          : run<FloatDot<PlainValue<std::int8_t>>>(job);
}

}  // namespace besa
