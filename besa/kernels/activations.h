// The activations, as the products want them: float32, quantized to int8, or as they are.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "floats.h"

namespace besa {
namespace {

// X of some tokens: [tokens, stride], with zeros past cols. The memory is another's.
template <class Traits>
struct TokenRows {
    using X = typename Traits::X;
    static constexpr int kStep = Traits::kStep;

    X* x;
    float* scale;  // [tokens], if they are quantized to int8
    std::int64_t stride;

    // Rows one cache line apart from a power of two, or all of them would share one set.
    static std::int64_t stride_of(std::int64_t cols) {
        const std::int64_t line = 64 / sizeof(X);
        const std::int64_t padded = (cols + kStep - 1) / kStep * kStep;
        return (padded + line - 1) / line * line + line;
    }

    // From column `col` of token t on; `col` is a multiple of kStep.
    const X* at(std::int64_t t, std::int64_t col) const { return x + t * stride + col; }

    // Those of token t and after it.
    TokenRows from(std::int64_t t) const {
        return {x + t * stride, Traits::kInt8Input ? scale + t : nullptr, stride};
    }

    // Makes token t of `cols` floats of a type.
    void make(const void* row, int dtype, std::int64_t cols, std::int64_t t) const {
        X* to = x + t * stride;
        const std::int64_t tail = cols / kStep * kStep;
        std::memset(to + tail, 0, (stride - tail) * sizeof(X));
        switch (dtype) {  // outside of the loops, which are vectors then
            case kBf16: convert<kBf16>(row, cols, t, to); break;
            case kFp16: convert<kFp16>(row, cols, t, to); break;
            default: convert<kFp32>(row, cols, t, to);
        }
    }

   private:
    template <int kFrom>
    void convert(const void* row, std::int64_t cols, std::int64_t t, X* to) const {
        const auto value = [row](std::int64_t j) { return load_float(row, kFrom, j); };
        if constexpr (Traits::kInt8Input) {
            scale[t] = quantize(value, cols, to);
        } else if constexpr (Traits::kRawInput) {
            std::memcpy(to, row, cols * sizeof(X));
        } else {
            // Even and odd columns by a loop within the loop, which makes vectors.
            constexpr int half = Traits::kSplit / 2;
            std::int64_t first = 0;
            if constexpr (half > 0)
                for (; first + 2 * half <= cols; first += 2 * half)
                    for (int i = 0; i < half; ++i) {
                        to[first + i] = value(first + 2 * i);
                        to[first + half + i] = value(first + 2 * i + 1);
                    }
            for (std::int64_t i = 0; first + i < cols; ++i)
                to[first + (half ? i % 2 * half + i / 2 : i)] = value(first + i);
        }
    }

    // Rounds a token to int8, the largest to 127 or -127; returns its scale, by which the product
    // is multiplied. A token with NaN or Inf has none: its scale is NaN, and so are its outputs.
    template <class Value>
    static float quantize(const Value& value, std::int64_t cols, X* to) {
        // The bits of sizes are ordered as the sizes are, infinity and NaN above all.
        std::int32_t bits = 0;
        for (std::int64_t j = 0; j < cols; ++j) {
            const std::int32_t size = float_to_bits(value(j)) & 0x7FFFFFFF;
            bits = size > bits ? size : bits;
        }
        const bool finite = bits < 0x7F800000;
        const float most = bits_to_float(bits);
        const float inverse = finite && most > 0 ? 127 / most : 0;
        for (std::int64_t j = 0; j < cols; ++j) {
            const float scaled = finite ? value(j) * inverse : 0;
            // Ties to even: adding 1.5 * 2^23 leaves no fraction.
            const int whole = static_cast<int>((scaled + 12582912.0f) - 12582912.0f);
            to[j] = static_cast<X>(whole + Traits::kOffset);
        }
        return finite ? most / 127 : __builtin_nanf("");
    }
};

// X of all tokens of a job. Made once for a call, by all its threads.
template <class Traits>
struct Activations : TokenRows<Traits> {
    // False if there is no memory.
    bool prepare(const Job& job) {
        this->stride = this->stride_of(job.cols);
        all_ = buffer<typename Traits::X>(job.tokens * this->stride);
        if (Traits::kInt8Input) scales_ = buffer<float>(job.tokens);
        if (!all_ || (Traits::kInt8Input && !scales_)) return false;
        this->x = all_.get();
        this->scale = scales_.get();
        const std::int64_t size = job.cols * float_size(job.input_dtype);
        std::atomic<std::int64_t> next{0};
        in_lanes(job, worthwhile_threads(job, job.tokens * job.cols), [&] {
            for (std::int64_t t; (t = next++) < job.tokens;)
                this->make(offset(job.input, t * size), job.input_dtype, job.cols, t);
        });
        return true;
    }

   private:
    Buffer<typename Traits::X> all_;
    Buffer<float> scales_;
};

}  // namespace
}  // namespace besa
