// What an expert does between its two products: a function of its gates, times its projections up.

#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"
#include "floats.h"

namespace besa {
namespace {

// e^x to some three units in the last place; NaN of NaN. A few multiplications, so that loops over it
// are vectors: powers of two by the exponent's bits, and what is left by a polynomial (Cephes' expf).
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // a whole number in the last bits
    const float n = shifted - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    constexpr float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f};
    float p = 1.9875691500e-4f;
    for (const float c : rest) p = p * r + c;
    const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3F800000);
    return (p * r * r + r + 1) * power;
}

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

template <int kFunction>
float function_of(float x, float alpha) {
    switch (kFunction) {
        case kSilu: return x * sigmoid(alpha * x);
        case kGelu: return 0.5f * x * (1 + erff(x * 0.70710678f));
        case kGeluTanh:  // (1 + tanh(y)) / 2 is sigmoid(2 y)
            return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
        default: return x > 0 || x != x ? x * x : 0;
    }
}

template <int kFunction>
void apply(const Experts& experts, int n, float* gate, const float* up) {
    const float limit = experts.limit, alpha = experts.alpha, shift = experts.shift;
    for (int i = 0; i < n; ++i) {
        const float x = gate[i] > limit ? limit : gate[i];
        gate[i] = function_of<kFunction>(x, alpha);
    }
    if (!experts.gated) return;
    for (int i = 0; i < n; ++i) {
        const float most = up[i] > limit ? limit : up[i];
        gate[i] *= (most < -limit ? -limit : most) + shift;
    }
}

// Replaces a row of what gate_up gave by what down multiplies, in its first half.
inline void activate(const Experts& experts, void* row) {
    constexpr int kBlock = 64;
    const std::int64_t inner = experts.down.cols;
    const int dtype = experts.down.input_dtype, apart = experts.interleaved ? 2 : 1;
    const std::int64_t to_up = !experts.gated ? 0 : experts.interleaved ? 1 : inner;
    for (std::int64_t first = 0; first < inner; first += kBlock) {
        const int n = static_cast<int>(least(kBlock, inner - first));
        float gate[kBlock], up[kBlock];
        load_floats(row, dtype, first * apart, apart, n, gate);
        load_floats(row, dtype, first * apart + to_up, apart, n, up);
        switch (experts.function) {
            case kSilu: apply<kSilu>(experts, n, gate, up); break;
            case kGelu: apply<kGelu>(experts, n, gate, up); break;
            case kGeluTanh: apply<kGeluTanh>(experts, n, gate, up); break;
            default: apply<kRelu2>(experts, n, gate, up);
        }
        store_floats(row, dtype, first, n, gate);
    }
}

}  // namespace
}  // namespace besa
