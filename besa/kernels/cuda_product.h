// y = x W^T on an NVIDIA GPU, with W as the records that cuda/records.cuh describes: which kernel, with
// what arguments, for how many tokens at a time.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "cuda_code.h"
#include "cuda_driver.h"

namespace besa::cuda {

// A weight [rows, cols], and how many bytes its parts have.
struct Weight {
    std::int64_t rows, cols;
    std::int64_t capacity;    // bytes of the largest record
    std::int64_t group_size;  // columns that share a scale; 0 where a row does
    Type type;                // of x and y, and of values that are not int8
    std::int64_t record_bytes;
    std::int64_t offsets;  // how many; 0 for 2:4
    std::int64_t scales;   // how many; 0 for values that are not int8
};

// Where the parts of a product are, on the GPU.
struct Operands {
    const void *records, *offsets, *scale;
    const void* x;  // [tokens, cols]
    void* y;        // [tokens, rows]
};

class Product {
   public:
    // Throws CudaError if the parts do not fit each other.
    explicit Product(const Weight& weight);

    // Queues the product. `code` is only read at the first call, which loads the kernels.
    void run(const void* code, std::size_t code_bytes, const Operands& operands,
             std::int64_t tokens, Handle stream) const;

   private:
    // A kernel that is loaded, for up to so many tokens.
    struct Loaded {
        std::int64_t tokens;
        Handle function;
        unsigned threads, shared, rows;  // of a thread block
    };

    void load(const Code& code, Handle context) const;

    Weight weight_;
    Kind kind_;
    int groups_;  // scales of a row
    mutable std::mutex mutex_;
    mutable Handle context_ = nullptr;  // whose kernels are loaded
    mutable std::array<Loaded, 4> loaded_{};
};

}  // namespace besa::cuda
