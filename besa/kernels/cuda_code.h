// The machine code that a model carries: instances of the kernel `multiply` of cuda/sparse_linear.cu,
// for several architectures, behind a table that says what each is for.
//
//     "BESACODE", version, count       8 bytes, two uint32
//     count entries of 64 bytes        Entry, below
//     names and images                 where the entries say, from the first byte on
//
// All numbers are little-endian. export/onnx/machine_code.py writes it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace besa::cuda {

// The kernel's template arguments of the same names.
enum Kind : std::uint32_t { kValues = 0, kTwoFour = 1, kInt8Float = 4 };
enum Type : std::uint32_t { kTypeBf16 = 0, kTypeFp16 = 1 };

struct Entry {
    std::uint32_t architecture;  // 90 for sm_90
    std::uint32_t type, kind, group;
    std::uint32_t tokens;  // at most
    std::uint32_t pieces;  // of 512 bytes that a record has, at most
    std::uint32_t blocks, warps, stages;
    std::uint32_t name_bytes;
    std::uint64_t name_at, image_at, image_bytes;
};
static_assert(sizeof(Entry) == 64);

// What a weight needs of an instance, and what the GPU gives.
struct Wanted {
    int major, minor;  // compute capability
    int shared_bytes;  // of a block, at most
    std::uint32_t type, kind, group, capacity;
};

// Bytes of shared memory of a block, as sparse_linear.cu lays it out.
std::uint32_t shared_bytes(const Entry& entry, std::uint32_t capacity);

class Code {
   public:
    // Throws CudaError if the table or what it names is not within the bytes.
    Code(const void* data, std::size_t bytes);

    // The first instance for so many tokens that fits, of the newest architecture whose code runs on
    // the GPU. Throws CudaError if there is none.
    const Entry& find(const Wanted& wanted, std::uint32_t tokens) const;

    std::string name(const Entry& entry) const { return part(entry.name_at, entry.name_bytes); }
    std::string image(const Entry& entry) const { return part(entry.image_at, entry.image_bytes); }

   private:
    std::string part(std::uint64_t at, std::uint64_t bytes) const {
        return {data_ + at, static_cast<std::size_t>(bytes)};
    }
    std::string architectures() const;

    const char* data_;
    std::vector<Entry> entries_;
};

}  // namespace besa::cuda
