// What the native libraries and their callers agree on: the numbers that stand for types, results and
// instruction sets, and the description of one product. abi.py says the same in Python. A library
// tells by besa_abi() what it was built with, so that one of another version is refused when it is
// loaded.

#pragma once

#include <cstdint>

namespace besa {

// Counts up with every change of an exported function or of what it means.
constexpr int kAbiVersion = 3;

enum Dtype : int { kBf16 = 0, kFp16 = 1, kFp32 = 2, kInt8 = 3, kInt4 = 4 };

enum Status : int { kOk = 0, kCorrupt = 1, kUnsupported = 2, kNoMemory = 3 };

// Instruction sets, of each family from the least to the most. isa.h says which a CPU has.
enum Isa : int { kPortable, kAvx2, kAvx2Vnni, kAvx512, kAvx512Bf16, kAvx512Dpbf16, kNeon, kNeonDot,
                 kNeonBf16, kIsas };

constexpr const char* kIsaNames[kIsas] = {
    "portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "avx512_dpbf16",
    "neon", "neon_dot", "neon_bf16"};

// How many columns may share a scale, other than a whole row.
constexpr std::int64_t kGroupSizes[] = {32, 64, 128};

// What an expert does between its two products.
enum Function : int { kSilu, kGelu, kGeluTanh, kRelu2, kFunctions };

constexpr const char* kFunctionNames[kFunctions] = {"silu", "gelu", "gelu_tanh", "relu2"};

struct Grouped;

// One product: output = input W^T + bias. Arrays are row-major, and all memory is the caller's.
struct Job {
    const void* values;           // [n_values] of values_dtype: the nonzeros of W, or all of it;
                                  // for int4 n_values is the number of bytes, see nibbles.h
    const std::uint8_t* bitmask;  // [rows, ceil(cols / 8)]; null: W is dense
    const std::int64_t* row_ptr;  // [rows + 1], into values; null with the bitmask
    const float* scale;           // [rows] for int4, [rows] or [rows, groups] for int8, else null
    const std::uint8_t* steps;    // [rows, groups of step_size] for int4, see nibbles.h; else null
    const void* bias;             // [rows] of input_dtype, or null
    const void* input;            // [tokens, cols] of input_dtype
    void* output;                 // [tokens, rows] of input_dtype
    std::int64_t n_values;
    std::int64_t tokens, rows, cols;
    std::int64_t group_size;      // columns that share a scale; 0: the whole row does
    std::int64_t step_size;       // columns that share a step; 0: the whole row does
    int values_dtype;             // a Dtype
    int input_dtype;              // a Dtype, of floats
    int int8_input;               // for int8 and int4 values: 1 quantizes the activations to int8 too
    int isa;                      // an Isa that this CPU has
    int threads;                  // at most so many

    // Runs lane(task) `lanes` times, at once where it can. Null: the library's own threads.
    void (*parallel)(void* pool, int lanes, void (*lane)(void*), void* task);
    void* pool;

    Grouped* grouped;             // see grouped.h; callers of the library say null
};

// The experts of one layer: output[t] = sum over k of weights[t, k] * down(act(gate_up(input[t]))),
// both products by the weights of expert ids[t, k].
//
// The two jobs are of all experts' weights, one below the other, and so are bitmask, row_ptr, scale,
// steps and bias; `rows` are those of one expert. gate_up.input and down.output are the layer's,
// gate_up.tokens its tokens; the other ends of the two products are made by the call.
struct Experts {
    Job gate_up, down;
    const std::int64_t* ids;  // [tokens, chosen]; others than [0, experts) add nothing
    const float* weights;     // [tokens, chosen]
    std::int64_t chosen, experts;
    int function;             // a Function, of the gate
    int gated;                // 0: there are no projections up beside the gates
    int interleaved;          // 1: gates are the even rows, 0: the first half of the rows
    float alpha;              // silu is gate * sigmoid(alpha * gate)
    float limit;              // a gate is at most this, a projection up between it and its negative
    float shift;              // is added to the projection up
};

}  // namespace besa
