// A product of many experts, as the threads that make a layer of them run it together.
//
//     ids [tokens, k]    pairs of token and expert,     groups      each has its rows of W
//                        sorted by expert
//     0: 5 2             0  (token 0, expert 2)         expert 2    rows 2 r to 3 r, times tokens 0, 1
//     1: 2 7             1  (token 1, expert 2)
//                        2  (token 0, expert 5)         expert 5    rows 5 r to 6 r, times token 0
//                        3  (token 1, expert 7)         expert 7    ...
//
// experts.cpp makes the groups and starts the threads once for a layer; here they go from phase to
// phase. All work of a phase is one list, pieces of all experts in turn, from which they take what is
// next: experts are small, and a token chooses few.
//
//     gate_up   prepare    each pair's token, as the product wants it
//               multiply   pieces of rows of each group, by direct.h or tiles.h
//     down      prepare    each pair's activation, from what gate_up gave
//               multiply
//               add up     the pairs of each token
//
// Many pairs are taken some experts at a time, so that what is between the products stays in the cache.

#pragma once

#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstdint>

#include "activations.h"
#include "direct.h"
#include "tiles.h"

namespace besa {

// Work that threads share: how much of it was taken, and how much is done.
struct Phase {
    std::atomic<std::int64_t> taken{0}, done{0};
};

// The pairs of an expert.
struct Group {
    std::int64_t expert, first, end;
};

// What one of the two products of a layer works on: some of the groups.
struct Grouped {
    const Experts* layer;
    const Group* groups;
    std::int64_t count;           // of groups
    const std::int64_t* token;    // [pairs] of the layer
    const std::int64_t* pair;     // [tokens, chosen], -1 where the expert is none
    void* x;                      // [pairs here, stride]: the activations
    float* scale;                 // [pairs here]: of them
    void* between;                // [pairs here, gate_up.rows]: what gate_up gives
    void* outputs;                // [pairs, down.rows]: what down gives
    Phase prepare, multiply, add_up;
    bool is_down, is_last;
};

namespace {

// Does of a phase what nobody else does, and comes back when all of it is done. As all that was taken
// is at work, it does not matter how many threads there are, or when they begin.
template <class Work>
void share(Phase& phase, std::int64_t count, const Work& work) {
    for (std::int64_t i; (i = phase.taken++) < count; ++phase.done) work(i);
    for (int turns = 0; phase.done < count; ++turns)
        if (turns > 1000) sched_yield();
}

// e^x to some three units in the last place; NaN of NaN. A few multiplications, so that loops over it
// are vectors: powers of two by the exponent's bits, and what is left by a polynomial (Cephes' expf).
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // a whole number in the last bits
    const float n = shifted - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                          5.0000001201e-1f})
        p = p * r + c;
    const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3F800000);
    return (p * r * r + r + 1) * power;
}

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

template <int kFunction>
float function_of(float x, float alpha) {
    switch (kFunction) {
        case kSilu: return x * sigmoid(alpha * x);
        case kGelu: return 0.5f * x * (1 + erff(x * 0.70710678f));
        case kGeluTanh:  // (1 + tanh(y)) / 2 is sigmoid(2 y)
            return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
        default: return x > 0 || x != x ? x * x : 0;
    }
}

template <int kFunction>
void apply(const Experts& layer, int n, float* gate, const float* up) {
    const float limit = layer.limit, alpha = layer.alpha, shift = layer.shift;
    for (int i = 0; i < n; ++i) {
        const float x = gate[i] > limit ? limit : gate[i];
        gate[i] = function_of<kFunction>(x, alpha);
    }
    if (!layer.gated) return;
    for (int i = 0; i < n; ++i) {
        const float most = up[i] > limit ? limit : up[i];
        gate[i] *= (most < -limit ? -limit : most) + shift;
    }
}

// Replaces a row of what gate_up gave by what down multiplies, in its first half.
inline void activate(const Experts& layer, void* row) {
    constexpr int kBlock = 64;
    const std::int64_t inner = layer.down.cols;
    const int dtype = layer.down.input_dtype, apart = layer.interleaved ? 2 : 1;
    const std::int64_t to_up = !layer.gated ? 0 : layer.interleaved ? 1 : inner;
    for (std::int64_t first = 0; first < inner; first += kBlock) {
        const int n = static_cast<int>(least(kBlock, inner - first));
        float gate[kBlock], up[kBlock];
        load_floats(row, dtype, first * apart, apart, n, gate);
        load_floats(row, dtype, first * apart + to_up, apart, n, up);
        switch (layer.function) {
            case kSilu: apply<kSilu>(layer, n, gate, up); break;
            case kGelu: apply<kGelu>(layer, n, gate, up); break;
            case kGeluTanh: apply<kGeluTanh>(layer, n, gate, up); break;
            default: apply<kRelu2>(layer, n, gate, up);
        }
        store_floats(row, dtype, first, n, gate);
    }
}

// Columns of the layer's output that a thread adds up at a time.
constexpr int kSumColumns = 512;

// Some columns of token t's output: what its experts gave, times their weights.
inline void add_up(const Grouped& g, std::int64_t t, std::int64_t first) {
    const Experts& layer = *g.layer;
    const std::int64_t hidden = layer.down.rows;
    const int n = static_cast<int>(least(kSumColumns, hidden - first));
    const int dtype = layer.down.input_dtype;
    float sums[kSumColumns] = {}, values[kSumColumns];
    for (std::int64_t i = t * layer.chosen; i < (t + 1) * layer.chosen; ++i) {
        if (g.pair[i] < 0) continue;
        const float weight = layer.weights[i];
        load_floats(g.outputs, dtype, g.pair[i] * hidden + first, 1, n, values);
        for (int c = 0; c < n; ++c) sums[c] += weight * values[c];
    }
    store_floats(layer.down.output, dtype, t * hidden + first, n, sums);
}

// The product of one group: of the job, what belongs to its expert and its pairs.
inline Job job_of(const Job& job, const Group& group, void* output) {
    Job own = job;
    const std::int64_t row = group.expert * job.rows, size = float_size(job.input_dtype);
    own.bitmask += row * ((job.cols + 7) / 8);
    own.row_ptr += row;
    if (job.scale) own.scale += row * groups_of(job, job.group_size);
    if (job.steps) own.steps += row * groups_of(job, job.step_size);
    if (job.bias) own.bias = offset(job.bias, row * size);
    own.tokens = group.end - group.first;
    own.output = output;
    return own;
}

// Rows [first, end) of W, times the job's tokens.
template <class Product, class Traits>
int rows_of(const Job& job, const Activations<Traits>& in, std::int64_t first, std::int64_t end) {
    Product product(job, in);
    if (!product.has_memory()) return kNoMemory;
    for (; first < end; first += kRowsPerPiece)
        product.run(first, least(first + kRowsPerPiece, end));
    return product.status();
}

// One thread's part in the product of all groups; returns a Status.
template <class Traits>
int run_grouped(const Job& job) {
    Grouped& g = *job.grouped;
    const Experts& layer = *g.layer;
    const std::int64_t start = g.groups[0].first, size = float_size(job.input_dtype);
    const Activations<Traits> in{static_cast<typename Traits::X*>(g.x), g.scale,
                                 Activations<Traits>::stride_of(job.cols)};
    share(g.prepare, g.groups[g.count - 1].end - start, [&](std::int64_t i) {
        const void* row = offset(layer.gate_up.input, g.token[start + i] * job.cols * size);
        if (g.is_down) {
            void* const given = offset(g.between, i * layer.gate_up.rows * size);
            activate(layer, given);
            row = given;
        }
        in.prepare(row, job.input_dtype, job.cols, i);
    });

    // Pieces small enough that all threads are busy to the end, and large enough for long streams.
    const std::int64_t fair = g.count * job.rows / (16 * job.threads) / kRowsPerPiece;
    const std::int64_t rows = kRowsPerPiece * (fair < 1 ? 1 : least(fair, 4));
    const std::int64_t pieces = (job.rows + rows - 1) / rows;
    int status = kOk;
    share(g.multiply, g.count * pieces, [&](std::int64_t i) {
        const Group& group = g.groups[i / pieces];
        const std::int64_t first = i % pieces * rows, end = least(first + rows, job.rows);
        void* const to = g.is_down ? offset(g.outputs, group.first * job.rows * size)
                                   : offset(g.between, (group.first - start) * job.rows * size);
        const Job own = job_of(job, group, to);
        const Activations<Traits> own_in = in.from(group.first - start);
        const int result = own.tokens >= Traits::kTileFrom
                               ? rows_of<Tiles<Traits, false>>(own, own_in, first, end)
                               : rows_of<Direct<Traits, false>>(own, own_in, first, end);
        if (result != kOk) status = result;
    });

    if (g.is_last) {
        const std::int64_t blocks = (layer.down.rows + kSumColumns - 1) / kSumColumns;
        share(g.add_up, layer.gate_up.tokens * blocks, [&](std::int64_t i) {
            add_up(g, i / blocks, i % blocks * kSumColumns);
        });
    }
    return status;
}

}  // namespace
}  // namespace besa
