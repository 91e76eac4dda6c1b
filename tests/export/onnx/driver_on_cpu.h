// A CUDA driver that runs kernels on the CPU, emulated. cuda_on_cpu.py includes it behind the kernels
// and `emulated`, their list. Two contexts, 1000 and 1001; a stream's handle is its context's. Only
// what the operator for ONNX Runtime calls is there.

#include <cxxabi.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {

struct Module {
    std::string image;
};

struct Function {
    const EmulatedKernel* kernel;  // null if it is not to be launched
    Module* module;
};

std::mutex mutex;
thread_local std::vector<long> contexts;  // of the calling thread, the current one last
thread_local int capture_mode = 0;

}  // namespace

#define SHOWN __attribute__((visibility("default")))
extern "C" {
// What a test sets.
SHOWN int capability[2] = {9, 0}, shared_opt_in = 232448, failing_launch = 0;
SHOWN long first_context = 1000;  // every thread's

// What a test reads: counts, the last launch, and the tokens of the last launches.
SHOWN int loads, launches, load_capture_mode, context_switches;
SHOWN unsigned launched_grid, launched_threads, launched_shared, max_dynamic_shared;
SHOWN long launched_context, launched_stream;
SHOWN int launched_tokens[64];
SHOWN char launch_error[500];
}

static long current() { return contexts.empty() ? first_context : contexts.back(); }

API cuInit(unsigned) { return 0; }

API cuGetErrorName(int status, const char** name) {
    *name = status == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : nullptr;
    return *name ? 0 : 1;
}

API cuCtxGetCurrent(long* context) { return *context = current(), 0; }

API cuCtxPushCurrent_v2(long context) { return contexts.push_back(context), ++context_switches, 0; }

API cuCtxPopCurrent_v2(long* context) { return *context = current(), contexts.pop_back(), 0; }

API cuCtxGetDevice(int* device) { return *device = int(current() - 1000), current() ? 0 : 201; }

API cuDeviceGetAttribute(int* value, int which, int) {
    if (which == 75) return *value = capability[0], 0;
    if (which == 76) return *value = capability[1], 0;
    if (which == 97) return *value = shared_opt_in, 0;
    return 1;
}

API cuStreamGetCtx(long stream, long* context) { return *context = stream, 0; }

API cuThreadExchangeStreamCaptureMode(int* mode) { return std::swap(*mode, capture_mode), 0; }

// An image of another length than its own header says would be one cut in the wrong place.
API cuModuleLoadData(Module** module, const unsigned char* image) {
    if (!current()) return 201;
    if (memcmp(image, "\177ELF", 4) || image[18] != 190) return 200;  // EM_CUDA
    uint64_t headers;
    uint16_t count;
    memcpy(&headers, image + 40, 8);
    memcpy(&count, image + 60, 2);
    load_capture_mode = capture_mode;
    *module = new Module{std::string(reinterpret_cast<const char*>(image), headers + 64 * count)};
    return ++loads, 0;
}

API cuModuleGetFunction(Function** function, Module* module, const char* symbol) {
    if (module->image.find(symbol) == std::string::npos) return 500;
    int status = 0;
    char* full = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    if (status) return 500;
    std::string name(full);  // void multiply<...>(Problem)
    std::free(full);
    name = name.substr(5, name.rfind('(') - 5);
    *function = new Function{nullptr, module};
    for (const EmulatedKernel& one : emulated)
        if (name == one.name) (*function)->kernel = &one;
    return 0;
}

API cuFuncSetAttribute(Function*, int which, int value) {
    if (which != 8) return 1;
    return max_dynamic_shared = value, 0;
}

API cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared, long stream,
                   void** arguments, void** extra) {
    if (failing_launch) return failing_launch;
    if (!function->kernel || extra || threads_y != 1 || threads_z != 1) return 1;
    if (shared > 48 * 1024 && shared > max_dynamic_shared) return 1;
    const std::lock_guard<std::mutex> lock(mutex);
    launched_grid = y, launched_threads = threads, launched_shared = shared;
    launched_context = current(), launched_stream = stream;
    launched_tokens[launches++ % 64] = static_cast<Problem*>(arguments[0])->tokens;
    long where = 0;
    emulator::Launch launch{arguments[0],    sizeof(Problem), int(x), int(y),
                            int(z),          int(threads),    int(shared), launch_error,
                            sizeof(launch_error), &where};
    return function->kernel->launch(&launch) ? 719 : 0;
}
