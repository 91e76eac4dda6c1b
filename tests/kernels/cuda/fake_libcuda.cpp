// A CUDA driver without a GPU: it keeps what it is asked for. See test_driver.py.
//
// Two devices, whose contexts are 1000 and 1001. A function's handle is its module's.

#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#define API extern "C" int

namespace {

using Handle = std::uintptr_t;

struct Attribute {
    int id;
    alignas(8) unsigned value[16];
};

struct Config {
    unsigned grid[3], block[3], shared_bytes;
    Handle stream;
    const Attribute* attributes;
    unsigned attribute_count;
};

std::mutex mutex;
thread_local std::vector<Handle> contexts;  // of the calling thread, the current one last
thread_local int capture_mode = 0;
Handle next_module = 1;

Handle current() { return contexts.empty() ? 0 : contexts.back(); }

}  // namespace

extern "C" {
// What the test sets: the next status of the function of this name, and the device's properties.
char failing[64];
int failing_status;
int capability[2] = {9, 0};
int shared_opt_in = 232448, static_shared = 0;
unsigned argument_bytes;

// What the test reads: the last launch, and counts.
Config launched;
Attribute launched_attributes[4];
unsigned char launched_arguments[256];
Handle launched_function, launched_context;
int launches, loads, max_dynamic_shared, load_capture_mode, context_switches;
}

static int status_of(const char* name) { return std::strcmp(name, failing) ? 0 : failing_status; }

API cuInit(unsigned) { return status_of("cuInit"); }

API cuDriverGetVersion(int* version) {
    *version = 12040;
    return 0;
}

API cuGetErrorName(int status, const char** name) {
    switch (status) {
        case 1: *name = "CUDA_ERROR_INVALID_VALUE"; return 0;
        case 100: *name = "CUDA_ERROR_NO_DEVICE"; return 0;
        case 101: *name = "CUDA_ERROR_INVALID_DEVICE"; return 0;
        case 201: *name = "CUDA_ERROR_INVALID_CONTEXT"; return 0;
        case 700: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; return 0;
        default: *name = nullptr; return 1;
    }
}

API cuDeviceGet(int* device, int index) {
    if (index < 0 || index > 1) return 101;
    *device = index;
    return 0;
}

API cuDeviceGetAttribute(int* value, int which, int) {
    if (which == 75) return *value = capability[0], 0;
    if (which == 76) return *value = capability[1], 0;
    if (which == 97) return *value = shared_opt_in, 0;
    return 1;
}

API cuDevicePrimaryCtxRetain(Handle* context, int device) {
    *context = 1000 + device;
    return 0;
}

API cuCtxGetCurrent(Handle* context) {
    *context = current();
    return 0;
}

API cuCtxPushCurrent_v2(Handle context) {
    contexts.push_back(context);
    ++context_switches;
    return 0;
}

API cuCtxPopCurrent_v2(Handle* context) {
    *context = current();
    contexts.pop_back();
    return 0;
}

API cuThreadExchangeStreamCaptureMode(int* mode) {
    std::swap(*mode, capture_mode);
    return 0;
}

API cuModuleLoadData(Handle* module, const char* image) {
    if (!current()) return 201;
    if (std::string(image, 4) != "\177ELF") return 200;
    std::lock_guard lock(mutex);
    load_capture_mode = capture_mode;
    *module = next_module++;
    ++loads;
    return status_of("cuModuleLoadData");
}

API cuModuleGetFunction(Handle* function, Handle module, const char*) {
    *function = module;
    return status_of("cuModuleGetFunction");
}

API cuFuncGetAttribute(int* value, int which, Handle) {
    if (which == 1) return *value = static_shared, 0;
    if (which == 3) return *value = 16, 0;
    if (which == 4) return *value = 40, 0;
    return 1;
}

API cuFuncSetAttribute(Handle, int which, int value) {
    if (which != 8 || !current()) return 1;
    max_dynamic_shared = value;
    return 0;
}

API cuLaunchKernelEx(const Config* config, Handle function, void** arguments, void** extra) {
    if (extra || config->attribute_count > 4) return 1;
    std::lock_guard lock(mutex);
    launched = *config;
    for (unsigned i = 0; i < config->attribute_count; ++i)
        launched_attributes[i] = config->attributes[i];
    std::memcpy(launched_arguments, arguments[0], argument_bytes);
    launched_function = function;
    launched_context = current();
    ++launches;
    return status_of("cuLaunchKernelEx");
}
