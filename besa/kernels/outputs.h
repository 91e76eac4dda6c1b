// The outputs, from the sums of products: scales, bias, and the caller's type.

#pragma once

#include <cstdint>

#include "activations.h"

namespace besa {
namespace {

template <int kTo>
BESA_INLINE inline void store_outputs_as(const Job& job, std::int64_t r, std::int64_t t, int n,
                                         float* values) {
    if (job.bias)
        for (int i = 0; i < n; ++i) values[i] += load_float(job.bias, kTo, r + i);
    for (int i = 0; i < n; ++i) store_float(job.output, kTo, t * job.rows + r + i, values[i]);
}

// Outputs r to r + n - 1 of token t. The type is asked for outside of the loops, which are vectors
// then. Overwrites `values`.
template <class Traits>
BESA_INLINE inline void store_outputs(const Job& job, const float* token_scale, std::int64_t r,
                                      std::int64_t t, int n, float* values) {
    if (job.scale && !job.group_size)
        for (int i = 0; i < n; ++i) values[i] *= job.scale[r + i];
    if constexpr (Traits::kInt8Input)
        for (int i = 0; i < n; ++i) values[i] *= token_scale[t];
    switch (job.input_dtype) {
        case kBf16: store_outputs_as<kBf16>(job, r, t, n, values); break;
        case kFp16: store_outputs_as<kFp16>(job, r, t, n, values); break;
        default: store_outputs_as<kFp32>(job, r, t, n, values);
    }
}

}  // namespace
}  // namespace besa
