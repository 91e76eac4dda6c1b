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
// next: experts are small, and a token chooses few. For AMX there are two lists, first the experts of
// few pairs, then the others, whose activations it wants otherwise (sparse_linear_avx512_amx.cpp).
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

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "activations.h"
#include "direct.h"
#include "gate.h"
#include "tiles.h"

namespace besa {

// Work that threads share: how much of it was taken, and how much is done.
struct Phase {
    std::atomic<std::int64_t> taken{0}, done{0};
};

// Pairs that AMX multiplies at a time.
constexpr std::int64_t kPairsOfBlock = 16;

// The pairs of an expert.
struct Group {
    std::int64_t expert, first, end;
    std::int64_t block;  // how many blocks of pairs are before them
};

// What the products of a layer share.
struct Layer {
    const Experts& experts;
    const std::int64_t* token;  // [pairs]
    const std::int64_t* pair;   // [tokens, chosen], -1 where the expert is none
    void* x;                    // of the pairs at a time: activations, as the product wants them
    float* scale;               // [pairs at a time]: of them
    void* between;              // [pairs at a time, gate_up.rows]: what gate_up gives
    void* outputs;              // [pairs, down.rows]: what down gives
};

// One of the two products of a layer, of some groups.
struct Grouped {
    const Layer* layer = nullptr;
    const Group* groups = nullptr;
    std::int64_t count = 0;
    bool many = false;  // whether each group has so many pairs that AMX takes them
    bool is_down = false, is_last = false;
    Phase prepare, multiply, add_up;
};

namespace {

inline std::int64_t blocks_of(const Group& group) {
    return (group.end - group.first + kPairsOfBlock - 1) / kPairsOfBlock;
}

// Where the pairs of a product begin, how many they are, and how many blocks of them.
inline std::int64_t first_pair(const Grouped& g) { return g.groups[0].first; }
inline std::int64_t pairs_of(const Grouped& g) { return g.groups[g.count - 1].end - first_pair(g); }
inline std::int64_t blocks_of(const Grouped& g) {
    const Group& last = g.groups[g.count - 1];
    return last.block + blocks_of(last) - g.groups[0].block;
}

// The group that has a product's i-th block of pairs.
inline const Group& group_of(const Grouped& g, std::int64_t i) {
    const auto is_before = [](std::int64_t block, const Group& group) { return block < group.block; };
    return *(std::upper_bound(g.groups, g.groups + g.count, g.groups[0].block + i, is_before) - 1);
}

// Does of a phase what nobody else does, and comes back when all of it is done. As all that was taken
// is at work, it does not matter how many threads there are, or when they begin.
template <class Work>
void share(Phase& phase, std::int64_t count, const Work& work) {
    for (std::int64_t i; (i = phase.taken++) < count; ++phase.done) work(i);
    for (int turns = 0; phase.done < count; ++turns)
        if (turns > 1000) sched_yield();
}

// From so many tokens of an expert on tiles are faster, if they aren't for fewer already.
constexpr int kTileFromGroup = 10;

// Columns of the layer's output that a thread adds up at a time.
constexpr int kSumColumns = 512;

// Some columns of token t's output: what its experts gave, times their weights.
inline void add_up(const Layer& layer, std::int64_t t, std::int64_t first) {
    const Experts& experts = layer.experts;
    const std::int64_t hidden = experts.down.rows;
    const int n = static_cast<int>(least(kSumColumns, hidden - first));
    const int dtype = experts.down.input_dtype;
    float sums[kSumColumns] = {}, values[kSumColumns];
    for (std::int64_t i = t * experts.chosen; i < (t + 1) * experts.chosen; ++i) {
        if (layer.pair[i] < 0) continue;
        const float weight = experts.weights[i];
        load_floats(layer.outputs, dtype, layer.pair[i] * hidden + first, 1, n, values);
        for (int c = 0; c < n; ++c) sums[c] += weight * values[c];
    }
    store_floats(experts.down.output, dtype, t * hidden + first, n, sums);
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

// What is multiplied of a pair, the i-th of the groups': its token, or the activation of what gate_up
// gave it.
inline const void* input_of(const Grouped& g, const Job& job, std::int64_t i) {
    const Layer& layer = *g.layer;
    const Job& gate_up = layer.experts.gate_up;
    const std::int64_t size = float_size(job.input_dtype);
    if (!g.is_down)
        return offset(gate_up.input, layer.token[first_pair(g) + i] * job.cols * size);
    void* const row = offset(layer.between, i * gate_up.rows * size);
    activate(layer.experts, row);
    return row;
}

// One thread's part in a product whose inputs are prepared; returns a Status. It calls
// product(job, group, first, end) for rows [first, end) of a group, with a job of that group alone.
// Rows are taken `height` at a time, or some times as many.
template <class Product>
int multiply_groups(Grouped& g, const Job& job, std::int64_t height, const Product& product) {
    const Layer& layer = *g.layer;
    const std::int64_t size = float_size(job.input_dtype);
    // Pieces small enough that all threads are busy to the end, and large enough for long streams.
    const std::int64_t fair = g.count * job.rows / (16 * job.threads) / height;
    const std::int64_t rows = height * (fair < 1 ? 1 : least(fair, 4));
    const std::int64_t pieces = (job.rows + rows - 1) / rows;
    int status = kOk;
    share(g.multiply, g.count * pieces, [&](std::int64_t i) {
        const Group& group = g.groups[i / pieces];
        void* const to =
            g.is_down ? offset(layer.outputs, group.first * job.rows * size)
                      : offset(layer.between, (group.first - first_pair(g)) * job.rows * size);
        const std::int64_t first = i % pieces * rows;
        const int result = product(job_of(job, group, to), group, first,
                                   least(first + rows, job.rows));
        if (result != kOk) status = result;
    });
    if (g.is_last) {
        const std::int64_t blocks = (job.rows + kSumColumns - 1) / kSumColumns;
        share(g.add_up, layer.experts.gate_up.tokens * blocks, [&](std::int64_t i) {
            add_up(layer, i / blocks, i % blocks * kSumColumns);
        });
    }
    return status;
}

// Rows [first, end) of W, `height` at a time, times the job's tokens.
template <class Product, class Input>
int rows_of(const Job& job, const Input& in, const typename Product::Memory& memory,
            std::int64_t height, std::int64_t first, std::int64_t end) {
    Product product(job, in, memory);
    if (!product.has_memory()) return kNoMemory;
    for (; first < end; first += height) product.run(first, least(first + height, end));
    return product.status();
}

// One thread's part in the product of all groups; returns a Status.
template <class Traits>
int run_grouped(const Job& job) {
    using Few = Direct<Traits, false>;
    using Many = Tiles<Traits, false>;
    Grouped& g = *job.grouped;
    const TokenRows<Traits> in{static_cast<typename Traits::X*>(g.layer->x), g.layer->scale,
                               TokenRows<Traits>::stride_of(job.cols)};
    share(g.prepare, pairs_of(g), [&](std::int64_t i) {
        in.make(input_of(g, job, i), job.input_dtype, job.cols, i);
    });
    const typename Few::Memory few;
    const typename Many::Memory many;
    const auto rows = [&](const Job& own, const Group& group, std::int64_t first, std::int64_t end) {
        const TokenRows<Traits> of_group = in.from(group.first - first_pair(g));
        return own.tokens >= least(Traits::kTileFrom, kTileFromGroup)
                   ? rows_of<Many>(own, of_group, many, kRowsPerPiece, first, end)
                   : rows_of<Few>(own, of_group, few, kRowsPerPiece, first, end);
    };
    return multiply_groups(g, job, kRowsPerPiece, rows);
}

}  // namespace
}  // namespace besa
