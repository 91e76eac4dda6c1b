#include "cuda_code.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "cuda_driver.h"

namespace besa::cuda {

namespace {

constexpr char kMagic[] = "BESACODE";
constexpr std::uint32_t kVersion = 1;

struct Header {
    char magic[8];
    std::uint32_t version, count;
};

// Machine code runs on GPUs of the same major version and at least the same minor one.
bool runs(std::uint32_t architecture, int major, int minor) {
    return static_cast<int>(architecture / 10) == major &&
           static_cast<int>(architecture % 10) <= minor;
}

bool within(std::uint64_t at, std::uint64_t size, std::size_t bytes) {
    return at <= bytes && size <= bytes - at;
}

}  // namespace

std::uint32_t shared_bytes(const Entry& entry, std::uint32_t capacity) {
    const std::uint32_t rings = 80 + entry.warps * entry.stages * entry.blocks * capacity;
    std::uint32_t eights = 1;
    while (8 * eights < entry.tokens) eights *= 2;
    return std::max(rings, entry.warps * entry.blocks * eights * 512);
}

Code::Code(const void* data, std::size_t bytes) : data_(static_cast<const char*>(data)) {
    Header header{};
    if (bytes >= sizeof(header)) std::memcpy(&header, data_, sizeof(header));
    if (std::memcmp(header.magic, kMagic, sizeof(header.magic)) != 0)
        throw CudaError("SparseMatMul: the machine code is damaged");
    if (header.version != kVersion)
        throw CudaError("SparseMatMul: the machine code is of another version: export again");
    if (!within(sizeof(header), std::uint64_t{header.count} * sizeof(Entry), bytes))
        throw CudaError("SparseMatMul: the machine code is cut off");
    entries_.resize(header.count);
    if (header.count)
        std::memcpy(entries_.data(), data_ + sizeof(header), header.count * sizeof(Entry));
    for (const Entry& entry : entries_) {
        if (!within(entry.name_at, entry.name_bytes, bytes) ||
            !within(entry.image_at, entry.image_bytes, bytes))
            throw CudaError("SparseMatMul: the machine code is cut off");
        const bool sizes = entry.tokens >= 1 && entry.tokens <= 64 && entry.blocks >= 1 &&
                           entry.blocks <= 4 && entry.warps >= 1 && entry.warps <= 32 &&
                           entry.stages >= 1 && entry.stages <= 8;
        if (!sizes) throw CudaError("SparseMatMul: the machine code is damaged");
    }
}

const Entry& Code::find(const Wanted& wanted, std::uint32_t tokens) const {
    const Entry* best = nullptr;
    bool runs_here = false;
    for (const Entry& entry : entries_) {
        if (!runs(entry.architecture, wanted.major, wanted.minor)) continue;
        runs_here = true;
        const bool fits =
            entry.type == wanted.type && entry.kind == wanted.kind && entry.group == wanted.group &&
            entry.tokens >= tokens && 512 * std::uint64_t{entry.pieces} >= wanted.capacity &&
            shared_bytes(entry, wanted.capacity) <= static_cast<std::uint32_t>(wanted.shared_bytes);
        if (fits && (!best || entry.architecture > best->architecture)) best = &entry;
    }
    if (best) return *best;
    const std::string gpu = "compute capability " + std::to_string(wanted.major) + "." +
                            std::to_string(wanted.minor);
    if (runs_here)
        throw CudaError("SparseMatMul: the model's machine code for " + gpu +
                        " has no kernel for this weight");
    throw CudaError("SparseMatMul: the model has no machine code for " + gpu + ", only for " +
                    architectures() + ": export it again with an NVRTC that knows this GPU");
}

std::string Code::architectures() const {
    std::set<std::uint32_t> all;
    for (const Entry& entry : entries_) all.insert(entry.architecture);
    std::string text;
    for (const std::uint32_t one : all)
        text += (text.empty() ? "sm_" : ", sm_") + std::to_string(one);
    return text.empty() ? "nothing" : text;
}

}  // namespace besa::cuda
