// Makes the groups of a layer of experts, and starts the threads that multiply them. See grouped.h.

#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <limits>
#include <new>
#include <vector>

#include "grouped.h"
#include "sparse_linear.h"

namespace besa {
namespace {

// Pairs that are worked on at a time: their activations, some megabytes, stay in a cache.
constexpr std::int64_t kPairs = 512;

// From so many pairs of an expert on AMX was measured to be faster; without it, none are many.
std::int64_t many_pairs(const Job& job) {
    if (job.isa != kAvx512Amx) return std::numeric_limits<std::int64_t>::max();
    return job.values_dtype == kBf16 ? 5 : 9;
}

// Pairs of token and expert, sorted by expert. Experts of fewer than `many_from` pairs come first.
struct Pairs {
    std::vector<Group> groups;
    std::vector<std::int64_t> token;  // [pairs]
    std::vector<std::int64_t> pair;   // [tokens, chosen], -1 where the expert is none
};

Pairs sorted(const Experts& layer, std::int64_t many_from) {
    Pairs pairs;
    const std::int64_t slots = layer.gate_up.tokens * layer.chosen;
    std::vector<std::int64_t> count(layer.experts), next(layer.experts);
    const auto is_here = [&](std::int64_t i) {
        return layer.ids[i] >= 0 && layer.ids[i] < layer.experts;
    };
    for (std::int64_t i = 0; i < slots; ++i)
        if (is_here(i)) ++count[layer.ids[i]];
    std::int64_t first = 0, block = 0;
    for (const bool many : {false, true})
        for (std::int64_t e = 0; e < layer.experts; ++e) {
            if (count[e] == 0 || (count[e] >= many_from) != many) continue;
            const Group group{e, first, first + count[e], block};
            pairs.groups.push_back(group);
            next[e] = first;
            first = group.end;
            block += blocks_of(group);
        }
    pairs.token.resize(first);
    pairs.pair.assign(slots, -1);
    for (std::int64_t i = 0; i < slots; ++i)
        if (is_here(i)) {
            pairs.pair[i] = next[layer.ids[i]]++;
            pairs.token[pairs.pair[i]] = i / layer.chosen;
        }
    return pairs;
}

// The groups that are worked on at a time: as many as have kPairs pairs, at least one, of one kind.
struct Part {
    const Group* groups;
    std::int64_t count;
    bool many;
};

std::vector<Part> parts_of(const std::vector<Group>& groups, std::int64_t many_from) {
    std::vector<Part> parts;
    for (const Group& group : groups) {
        const bool many = group.end - group.first >= many_from;
        if (parts.empty() || group.end - parts.back().groups->first > kPairs ||
            parts.back().many != many)
            parts.push_back({&group, 0, many});
        ++parts.back().count;
    }
    return parts;
}

int run(const Experts& experts) {
    const Job &gate_up = experts.gate_up, &down = experts.down;
    const std::int64_t size = float_size(down.input_dtype);
    const std::int64_t many_from = many_pairs(gate_up);
    const Pairs pairs = sorted(experts, many_from);
    if (pairs.groups.empty()) {
        if (gate_up.tokens && down.rows)
            std::memset(down.output, 0, gate_up.tokens * down.rows * size);
        return kOk;
    }
    const auto count = static_cast<std::int64_t>(pairs.token.size());
    std::deque<Grouped> products;  // gate_up and down of each part in turn
    std::int64_t most = 0, rows = 0;  // pairs at a time, and with those that blocks lack
    for (const Part& part : parts_of(pairs.groups, many_from))
        for (const bool is_down : {false, true}) {
            Grouped& g = products.emplace_back();
            g.groups = part.groups;
            g.count = part.count;
            g.many = part.many;
            g.is_down = is_down;
            most = std::max(most, pairs_of(g));
            rows = std::max(rows, g.many ? blocks_of(g) * kPairsOfBlock : pairs_of(g));
        }
    products.back().is_last = true;

    // Room for activations of any type, and the cache lines that a row may have more.
    const auto x = buffer<float>(rows * (std::max(gate_up.cols, down.cols) + 256));
    const auto scale = buffer<float>(most);
    const auto between = buffer<char>(most * gate_up.rows * size);
    const auto outputs = buffer<char>(count * down.rows * size);
    if (!x || !scale || !between || !outputs) return kNoMemory;
    const Layer layer{experts,     pairs.token.data(), pairs.pair.data(), x.get(),
                      scale.get(), between.get(),      outputs.get()};
    for (Grouped& g : products) g.layer = &layer;

    const std::int64_t weights = gate_up.rows * gate_up.cols + down.rows * down.cols;
    const int threads = worthwhile_threads(gate_up, weights * count);
    std::atomic<int> status{kOk};
    in_lanes(gate_up, threads, [&] {
        for (Grouped& g : products) {
            Job job = g.is_down ? down : gate_up;
            job.tokens = 0;  // each group has its own
            job.threads = threads;
            job.grouped = &g;
            if (const int result = sparse_linear(job)) status = result;
        }
    });
    return status;
}

}  // namespace

int sparse_experts(const Experts& experts) {
    try {
        return run(experts);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace besa
