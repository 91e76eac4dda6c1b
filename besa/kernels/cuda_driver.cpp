#include "cuda_driver.h"

#include <dlfcn.h>

#include <string>

namespace besa::cuda {

namespace {

std::string error_name(const Driver& found, int status) {
    const char* name = nullptr;
    if (found.cuGetErrorName(status, &name) == 0 && name) return name;
    return "CUDA error " + std::to_string(status);
}

template <class F>
void find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    if (!function)
        throw CudaError(std::string("SparseMatMul: the NVIDIA driver is too old: it has no ") + name);
}

Driver load(const char* name) {
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        throw CudaError(std::string("SparseMatMul: no NVIDIA driver is installed (") + name + ")");
    Driver found{};
    find(library, "cuInit", found.cuInit);
    find(library, "cuGetErrorName", found.cuGetErrorName);
    find(library, "cuCtxGetCurrent", found.cuCtxGetCurrent);
    find(library, "cuCtxPushCurrent_v2", found.cuCtxPushCurrent_v2);
    find(library, "cuCtxPopCurrent_v2", found.cuCtxPopCurrent_v2);
    find(library, "cuCtxGetDevice", found.cuCtxGetDevice);
    find(library, "cuDeviceGetAttribute", found.cuDeviceGetAttribute);
    find(library, "cuStreamGetCtx", found.cuStreamGetCtx);
    find(library, "cuThreadExchangeStreamCaptureMode", found.cuThreadExchangeStreamCaptureMode);
    find(library, "cuModuleLoadData", found.cuModuleLoadData);
    find(library, "cuModuleGetFunction", found.cuModuleGetFunction);
    find(library, "cuFuncSetAttribute", found.cuFuncSetAttribute);
    find(library, "cuLaunchKernel", found.cuLaunchKernel);
    if (const int status = found.cuInit(0))
        throw CudaError("SparseMatMul: the NVIDIA driver does not start: " +
                        error_name(found, status));
    return found;
}

}  // namespace

const Driver& driver(const char* library) {
    static const Driver found = load(library);  // tried again if it throws
    return found;
}

void check(int status, const char* what) {
    if (status)
        throw CudaError("SparseMatMul: " + error_name(driver(), status) + ": could not " + what);
}

Current::Current(Handle stream, Handle usual) {
    Handle now = nullptr;
    check(driver().cuCtxGetCurrent(&now), "find the thread's context");
    context_ = now;
    if (stream && (!now || now != usual))
        check(driver().cuStreamGetCtx(stream, &context_), "find the stream's context");
    if (!context_) throw CudaError("SparseMatMul: this thread has no GPU");
    if (context_ == now) return;
    check(driver().cuCtxPushCurrent_v2(context_), "use the GPU");
    pushed_ = true;
}

Current::~Current() {
    Handle popped = nullptr;
    if (pushed_) driver().cuCtxPopCurrent_v2(&popped);
}

WhileCapturing::WhileCapturing() {
    check(driver().cuThreadExchangeStreamCaptureMode(&mode_), "change the capture mode");
}

WhileCapturing::~WhileCapturing() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

}  // namespace besa::cuda
