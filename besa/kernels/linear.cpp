// The C face of the sparse product, on OpenMP's threads. See sparse_linear.h.

#include "sparse_linear.h"

namespace {

void on_openmp(void*, int lanes, void (*lane)(void*), void* task) {
#pragma omp parallel num_threads(lanes)
    lane(task);
}

}  // namespace

#define BESA_API extern "C" __attribute__((visibility("default")))

BESA_API int besa_last_isa() { return besa::last_isa(); }

BESA_API int besa_best_isa() { return besa::best_isa(); }

// output = input W^T + bias. See besa::Job for the arguments; returns a besa::Status.
BESA_API int besa_sparse_linear(const void* values, int values_dtype, std::int64_t count,
                                const std::uint8_t* bitmask_or_null,
                                const std::int64_t* row_ptr_or_null, const float* scale_or_null,
                                std::int64_t group_size, const void* bias_or_null,
                                const void* input, int input_dtype, void* output,
                                std::int64_t tokens, std::int64_t rows, std::int64_t cols,
                                int int8_input, int isa, int threads) {
    const besa::Job job{values,        count,  bitmask_or_null, row_ptr_or_null, scale_or_null,
                        group_size,    bias_or_null, input,     output,          tokens,
                        rows,          cols,   values_dtype,    input_dtype,     int8_input != 0,
                        threads,       on_openmp, nullptr};
    return besa::sparse_linear(job, isa);
}
