// `ai.besa::SparseMatMul` for NVIDIA GPUs.

#pragma once

#include <onnxruntime_c_api.h>

// Adds the operators to a domain. `provider` is the execution provider whose tensors they take: that
// of CUDA, or in the tests the CPU's, beside a driver that runs kernels there.
void add_cuda_operators(const OrtApi* runtime, OrtCustomOpDomain* domain, const char* provider);
