// bfloat16 and float16 to float and back, one at a time, to nearest, ties to even; and floats of any
// type in memory.

#pragma once

#include <cstdint>
#include <cstring>

#include "abi.h"

namespace besa {
namespace {

inline float bits_to_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline std::uint32_t float_to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float bf16_to_float(std::uint16_t half) {
    return bits_to_float(static_cast<std::uint32_t>(half) << 16);
}

inline std::uint16_t float_to_bf16(float value) {
    const std::uint32_t bits = float_to_bits(value);
    if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
    return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

#if defined(__aarch64__) || defined(__FLT16_MANT_DIG__)

#ifdef __aarch64__
using Half = __fp16;  // to GCC 12 the other name is C's alone there
#else
using Half = _Float16;
#endif

inline float fp16_to_float(std::uint16_t half) {
    Half value;
    std::memcpy(&value, &half, 2);
    return static_cast<float>(value);
}

inline std::uint16_t float_to_fp16(float value) {
    const Half half = static_cast<Half>(value);
    std::uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

#else  // a compiler without the type

inline float fp16_to_float(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16;
    const std::uint32_t rest = half & 0x7FFF;
    if (rest >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    // 2^112 moves the exponent's bias from 15 to 127; denormals come out right by themselves.
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

inline std::uint16_t float_to_fp16(float value) {
    const std::uint32_t bits = float_to_bits(value);
    const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    const std::uint32_t size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return static_cast<std::uint16_t>(sign | 0x7E00 | (size >> 13 & 0x3FF));
    if (size >= 0x477FF000) return static_cast<std::uint16_t>(sign | 0x7C00);
    if (size < 0x38800000) {  // denormal: adding 0.5 leaves the number in the last bits
        const std::uint32_t shifted = float_to_bits(bits_to_float(size) + 0.5f);
        return static_cast<std::uint16_t>(sign | (shifted - 0x3F000000));
    }
    const std::uint32_t rounded = size - 0x38000000 + 0xFFF + (size >> 13 & 1);
    return static_cast<std::uint16_t>(sign | rounded >> 13);
}

#endif

inline std::int64_t float_size(int dtype) { return dtype == kFp32 ? 4 : 2; }

inline float load_float(const void* from, int dtype, std::int64_t i) {
    switch (dtype) {
        case kBf16: return bf16_to_float(static_cast<const std::uint16_t*>(from)[i]);
        case kFp16: return fp16_to_float(static_cast<const std::uint16_t*>(from)[i]);
        default: return static_cast<const float*>(from)[i];
    }
}

inline void store_float(void* to, int dtype, std::int64_t i, float value) {
    switch (dtype) {
        case kBf16: static_cast<std::uint16_t*>(to)[i] = float_to_bf16(value); break;
        case kFp16: static_cast<std::uint16_t*>(to)[i] = float_to_fp16(value); break;
        default: static_cast<float*>(to)[i] = value;
    }
}

// `n` floats, `apart` from each other, from element `first` on. The type is asked for outside of the
// loop, which is a vector's then.
template <int kFrom>
void load_floats_as(const void* from, std::int64_t first, int apart, int n, float* to) {
    if (apart == 1)
        for (int i = 0; i < n; ++i) to[i] = load_float(from, kFrom, first + i);
    else
        for (int i = 0; i < n; ++i) to[i] = load_float(from, kFrom, first + i * apart);
}

inline void load_floats(const void* from, int dtype, std::int64_t first, int apart, int n, float* to) {
    switch (dtype) {
        case kBf16: return load_floats_as<kBf16>(from, first, apart, n, to);
        case kFp16: return load_floats_as<kFp16>(from, first, apart, n, to);
        default: load_floats_as<kFp32>(from, first, apart, n, to);
    }
}

// To element `first` and those after it.
template <int kTo>
void store_floats_as(void* to, std::int64_t first, int n, const float* values) {
    for (int i = 0; i < n; ++i) store_float(to, kTo, first + i, values[i]);
}

inline void store_floats(void* to, int dtype, std::int64_t first, int n, const float* values) {
    switch (dtype) {
        case kBf16: return store_floats_as<kBf16>(to, first, n, values);
        case kFp16: return store_floats_as<kFp16>(to, first, n, values);
        default: store_floats_as<kFp32>(to, first, n, values);
    }
}

}  // namespace
}  // namespace besa
