// What the operator for NVIDIA GPUs uses of the CUDA driver's C interface. The driver is found at run
// time (libcuda.so.1): the library is built without CUDA, and loads where there is none.
//
// https://docs.nvidia.com/cuda/cuda-driver-api has the functions and numbers.

#pragma once

#include <stdexcept>

namespace besa::cuda {

// CUcontext, CUmodule, CUfunction and CUstream.
using Handle = void*;

// CUdevice_attribute, CUfunction_attribute, CUstreamCaptureMode.
constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76, kSharedBytesOptIn = 97;
constexpr int kMaxDynamicSharedBytes = 8;
constexpr int kCaptureRelaxed = 2;
// CUresult of loading machine code that the driver is too old for: CUDA_ERROR_INVALID_IMAGE,
// CUDA_ERROR_NO_BINARY_FOR_GPU and CUDA_ERROR_UNSUPPORTED_PTX_VERSION.
constexpr int kCodeIsTooNew[] = {200, 209, 222};

// Why a product cannot be computed, in one line.
struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Driver {
    int (*cuInit)(unsigned);
    int (*cuGetErrorName)(int, const char**);
    int (*cuCtxGetCurrent)(Handle*);
    int (*cuCtxPushCurrent_v2)(Handle);
    int (*cuCtxPopCurrent_v2)(Handle*);
    int (*cuCtxGetDevice)(int*);
    int (*cuDeviceGetAttribute)(int*, int, int);
    int (*cuStreamGetCtx)(Handle, Handle*);
    int (*cuThreadExchangeStreamCaptureMode)(int*);
    int (*cuModuleLoadData)(Handle*, const void*);
    int (*cuModuleGetFunction)(Handle*, Handle, const char*);
    int (*cuFuncSetAttribute)(Handle, int, int);
    int (*cuLaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                          unsigned, Handle, void**, void**);
};

// The driver, initialized at the first call, which alone says where it is. Throws CudaError where
// there is none.
const Driver& driver(const char* library = "libcuda.so.1");

// Throws CudaError if `status`, what one of the driver's functions returned, is an error.
void check(int status, const char* what);

// While it lives, the context of a stream is the thread's. The driver is only asked for the stream's
// where the thread has not the usual one. The default stream has the thread's.
class Current {
   public:
    Current(Handle stream, Handle usual);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

    Handle context() const { return context_; }

   private:
    Handle context_ = nullptr;
    bool pushed_ = false;
};

// While it lives, what is done once, such as loading code, is allowed although a CUDA graph is
// captured.
class WhileCapturing {
   public:
    WhileCapturing();
    ~WhileCapturing();
    WhileCapturing(const WhileCapturing&) = delete;
    WhileCapturing& operator=(const WhileCapturing&) = delete;

   private:
    int mode_ = kCaptureRelaxed;
};

}  // namespace besa::cuda
