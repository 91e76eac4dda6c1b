// The operator's product by itself, for ctypes: test_cuda_product.py. DRIVER is the driver's path.

#include <cstdio>

#include "cuda_product.h"

// 0, or 1 with `error` filled.
extern "C" __attribute__((visibility("default"))) int product(
    const besa::cuda::Weight* weight, const besa::cuda::Operands* operands, const void* code,
    std::size_t code_bytes, std::int64_t tokens, besa::cuda::Handle stream, int times, char* error,
    std::size_t error_size) {
    try {
        besa::cuda::driver(DRIVER);
        const besa::cuda::Product one(*weight);
        for (int i = 0; i < times; ++i) one.run(code, code_bytes, *operands, tokens, stream);
        return 0;
    } catch (const besa::cuda::CudaError& failed) {
        std::snprintf(error, error_size, "%s", failed.what());
        return 1;
    }
}
