// NEON with dot products (Arm since Cortex-A75 and Neoverse N1, Apple since M1): int8 by int8, four
// products a lane and instruction.

#include "sparse_linear_neon.h"

namespace besa {
namespace {

struct Products {
    static int32x4_t add(int32x4_t sums, int8x16_t w, int8x16_t x) { return vdotq_s32(sums, w, x); }
};

}  // namespace

int sparse_linear_neon_dot(const Job& job) {
    if (job.values_dtype == kInt8 && job.int8_input) return run_int8<Products>(job);
    return sparse_linear_neon(job);
}

}  // namespace besa
