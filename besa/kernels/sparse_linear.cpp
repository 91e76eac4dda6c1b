// Calls the instruction set that a job names. See sparse_linear.h.

#include "sparse_linear.h"

#include "isa.h"

namespace besa {

// Whether the instruction set has a product of int4 values of its own.
static bool has_int4(const Job& job) {
    switch (job.isa) {
        case kAvx2:
        case kAvx2Vnni:
        case kAvx512Bf16:
        case kAvx512Dpbf16:
        case kAvx512Amx: return job.int8_input;
        default: return false;
    }
}

int sparse_linear(const Job& job) {
    if (!has_isa(job.isa)) return kUnsupported;
    if (job.values_dtype == kInt4 && !has_int4(job)) {
        Job as_int8 = job;  // row by row, see packed_rows.h
        as_int8.values_dtype = kInt8;
        return sparse_linear(as_int8);
    }
    switch (job.isa) {
#ifdef __x86_64__
#ifdef BESA_AMX
        case kAvx512Amx: return sparse_linear_avx512_amx(job);
#endif
        case kAvx512Dpbf16: return sparse_linear_avx512_dpbf16(job);
        case kAvx512Bf16: return sparse_linear_avx512_bf16(job);
        case kAvx512: return sparse_linear_avx512(job);
#ifdef BESA_AVX2_VNNI
        case kAvx2Vnni: return sparse_linear_avx2_vnni(job);
#endif
        case kAvx2: return sparse_linear_avx2(job);
#elif defined(__aarch64__)
        case kNeonBf16: return sparse_linear_neon_bf16(job);
        case kNeonDot: return sparse_linear_neon_dot(job);
        case kNeon: return sparse_linear_neon(job);
#endif
        default: return sparse_linear_portable(job);
    }
}

}  // namespace besa
