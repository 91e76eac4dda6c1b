#include "cuda_product.h"

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <utility>

namespace besa::cuda {

namespace {

constexpr std::int64_t kTileRows = 16, kTileCols = 64, kGroupedBlocks = 4;
constexpr std::int64_t kMaskBytes = 128, kTwoFourBytes = 1152, kUnit = 16;
constexpr int kUsualShared = 48 * 1024;  // what a launch may have without asking

// As in cuda/sparse_linear.cu.
struct Problem {
    const void* records;
    const void* offsets;
    const void* x;
    const float* x_scale;
    const void* scale;
    const void* bias;
    void* y;
    int rows, cols, tokens;
    int capacity;
    int groups;
    int group_log;
};
static_assert(sizeof(Problem) == 80);

std::int64_t parts(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// A kernel in a context. Layers share it, and it stays until the process ends.
Handle function_of(Handle context, const std::string& image, const std::string& name) {
    static std::mutex mutex;
    static std::map<std::pair<Handle, std::string>, Handle> loaded;
    const std::lock_guard lock(mutex);
    auto [place, fresh] = loaded.try_emplace({context, image}, nullptr);
    if (place->second) return place->second;
    const WhileCapturing capturing;
    Handle module = nullptr, function = nullptr;
    const int status = driver().cuModuleLoadData(&module, place->first.second.data());
    for (const int too_new : kCodeIsTooNew)
        if (status == too_new)
            throw CudaError(
                "SparseMatMul: the NVIDIA driver is too old for the model's machine code: update it");
    check(status, "load machine code");
    check(driver().cuModuleGetFunction(&function, module, name.c_str()), "find the kernel");
    return place->second = function;
}

int device_attribute(int which) {
    int device = 0, value = 0;
    check(driver().cuCtxGetDevice(&device), "find the GPU");
    check(driver().cuDeviceGetAttribute(&value, which, device), "read an attribute of the GPU");
    return value;
}

}  // namespace

Product::Product(const Weight& weight) : weight_(weight) {
    const auto refuse = [](const char* what) {
        throw CudaError(std::string("SparseMatMul: the records are damaged: ") + what);
    };
    constexpr std::int64_t most_rows = 65535 * kTileRows;  // a grid's height, in blocks of rows
    constexpr std::int64_t most_cols = std::numeric_limits<int>::max() - kTileCols;
    if (weight.rows < 1 || weight.cols < 1 || weight.rows > most_rows ||
        weight.cols > most_cols || weight.cols % kTileCols)
        refuse("out_features and in_features, a multiple of 64, cannot be these");
    const std::int64_t blocks = parts(weight.rows, kTileRows * kGroupedBlocks) * kGroupedBlocks;
    const std::int64_t records = blocks * (weight.cols / kTileCols);
    kind_ = weight.scales ? kInt8Float : weight.offsets ? kValues : kTwoFour;
    if (kind_ == kTwoFour) {
        if (weight.capacity != kTwoFourBytes || weight.record_bytes != records * kTwoFourBytes)
            refuse("there are not as many as the shape says");
    } else {
        const std::int64_t largest =
            kMaskBytes + kTileRows * kTileCols * (kind_ == kInt8Float ? 1 : 2);
        if (weight.offsets != records + 1) refuse("there are not as many as the shape says");
        if (weight.capacity < kMaskBytes || weight.capacity > largest || weight.capacity % kUnit)
            refuse("capacity is no record's size");
        if (weight.record_bytes < records * kMaskBytes ||
            weight.record_bytes > records * weight.capacity || weight.record_bytes % kUnit)
            refuse("their bytes do not fit the shape");
    }
    const std::int64_t group = weight.group_size;
    if (group != 0 && group != 32 && group != 64 && group != 128)
        refuse("group_size is neither 0 nor one that the kernels know");
    const std::int64_t groups = group ? parts(weight.cols, group) : 1;
    if (weight.scales && weight.scales != weight.rows * groups)
        refuse("the scales do not fit out_features and group_size");
    groups_ = weight.scales ? static_cast<int>(groups) : 0;
}

void Product::load(const Code& code, Handle context) const {
    Wanted wanted{};
    wanted.major = device_attribute(kCapabilityMajor);
    wanted.minor = device_attribute(kCapabilityMinor);
    wanted.shared_bytes = device_attribute(kSharedBytesOptIn);
    wanted.type = weight_.type;
    wanted.kind = kind_;
    wanted.group = weight_.scales ? std::min<std::uint32_t>(weight_.group_size, 64) : 0;
    wanted.capacity = static_cast<std::uint32_t>(weight_.capacity);
    std::uint32_t tokens = 8;
    for (Loaded& one : loaded_) {
        const Entry& entry = code.find(wanted, tokens);
        one.tokens = tokens;
        one.threads = 32 * entry.warps;
        one.rows = static_cast<unsigned>(kTileRows) * entry.blocks;
        one.shared = shared_bytes(entry, wanted.capacity);
        one.function = function_of(context, code.image(entry), code.name(entry));
        if (one.shared > static_cast<unsigned>(kUsualShared))
            check(driver().cuFuncSetAttribute(one.function, kMaxDynamicSharedBytes,
                                              wanted.shared_bytes),
                  "give a kernel its shared memory");
        tokens *= 2;
    }
    context_ = context;
}

void Product::run(const void* code, std::size_t code_bytes, const Operands& operands,
                  std::int64_t tokens, Handle stream) const {
    if (tokens == 0) return;
    const std::lock_guard lock(mutex_);
    const Current current(stream, context_);
    if (current.context() != context_) load(Code(code, code_bytes), current.context());
    Problem problem{};
    problem.records = operands.records;
    problem.offsets = operands.offsets;
    problem.scale = operands.scale;
    problem.rows = static_cast<int>(weight_.rows);
    problem.cols = static_cast<int>(weight_.cols);
    problem.capacity = static_cast<int>(weight_.capacity);
    problem.groups = groups_;
    problem.group_log = weight_.group_size == 128 ? 1 : 0;
    const auto* x = static_cast<const char*>(operands.x);
    auto* y = static_cast<char*>(operands.y);
    // ONNX Runtime's allocators for GPUs give multiples of 256.
    for (const void* begin : {operands.records, operands.x})
        if (reinterpret_cast<std::uintptr_t>(begin) % kUnit)
            throw CudaError("SparseMatMul: X or records do not begin at a multiple of 16 bytes");
    for (std::int64_t done = 0; done < tokens; done += loaded_.back().tokens) {
        const std::int64_t some = std::min(tokens - done, loaded_.back().tokens);
        const Loaded& kernel = *std::find_if(loaded_.begin(), loaded_.end(),
                                             [&](const Loaded& one) { return some <= one.tokens; });
        problem.x = x + done * weight_.cols * 2;
        problem.y = y + done * weight_.rows * 2;
        problem.tokens = static_cast<int>(some);
        void* arguments[] = {&problem};
        // Clusters of one thread block each, one for each block of rows.
        const unsigned clusters = static_cast<unsigned>(parts(weight_.rows, kernel.rows));
        check(driver().cuLaunchKernel(kernel.function, 1, clusters, 1, kernel.threads, 1, 1,
                                      kernel.shared, stream, arguments, nullptr),
              "launch a kernel");
    }
}

}  // namespace besa::cuda
