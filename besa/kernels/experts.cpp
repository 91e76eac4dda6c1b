// Makes the groups of a layer of experts, and starts the threads that multiply them. See grouped.h.

#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <new>
#include <vector>

#include "grouped.h"
#include "sparse_linear.h"

namespace besa {
namespace {

// Pairs that are worked on at a time: their activations, some megabytes, stay in a cache.
constexpr std::int64_t kPairs = 512;

// Pairs of token and expert, sorted by expert.
struct Pairs {
    std::vector<Group> groups;
    std::vector<std::int64_t> token;  // [pairs]
    std::vector<std::int64_t> pair;   // [tokens, chosen], -1 where the expert is none
};

Pairs sorted(const Experts& layer) {
    Pairs pairs;
    const std::int64_t slots = layer.gate_up.tokens * layer.chosen;
    std::vector<std::int64_t> next(layer.experts);
    const auto is_here = [&](std::int64_t i) {
        return layer.ids[i] >= 0 && layer.ids[i] < layer.experts;
    };
    for (std::int64_t i = 0; i < slots; ++i)
        if (is_here(i)) ++next[layer.ids[i]];
    std::int64_t first = 0;
    for (std::int64_t e = 0; e < layer.experts; ++e) {
        const std::int64_t end = first + next[e];
        if (end > first) pairs.groups.push_back({e, first, end});
        next[e] = first;
        first = end;
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

// How many groups are worked on at a time: as many as have kPairs pairs, at least one.
std::vector<std::int64_t> parts_of(const std::vector<Group>& groups) {
    std::vector<std::int64_t> parts;
    std::int64_t first = 0;  // pair of the part
    for (const Group& group : groups) {
        if (parts.empty() || group.end - first > kPairs) {
            parts.push_back(0);
            first = group.first;
        }
        ++parts.back();
    }
    return parts;
}

int run(const Experts& experts) {
    const Job &gate_up = experts.gate_up, &down = experts.down;
    const std::int64_t size = float_size(down.input_dtype);
    const Pairs pairs = sorted(experts);
    if (pairs.groups.empty()) {
        if (gate_up.tokens && down.rows)
            std::memset(down.output, 0, gate_up.tokens * down.rows * size);
        return kOk;
    }
    const std::vector<std::int64_t> parts = parts_of(pairs.groups);
    const auto count = static_cast<std::int64_t>(pairs.token.size());
    std::int64_t most = 0;  // pairs at a time
    const Group* group = pairs.groups.data();
    for (const std::int64_t groups : parts) {
        most = std::max(most, group[groups - 1].end - group->first);
        group += groups;
    }

    // Room for activations of any type, and the cache lines that a row may have more.
    const auto x = buffer<float>(most * (std::max(gate_up.cols, down.cols) + 256));
    const auto scale = buffer<float>(most);
    const auto between = buffer<char>(most * gate_up.rows * size);
    const auto outputs = buffer<char>(count * down.rows * size);
    if (!x || !scale || !between || !outputs) return kNoMemory;
    const Layer layer{experts,     pairs.token.data(), pairs.pair.data(), x.get(),
                      scale.get(), between.get(),      outputs.get()};

    std::deque<Grouped> products;  // gate_up and down of each part in turn
    group = pairs.groups.data();
    for (const std::int64_t groups : parts) {
        for (const bool is_down : {false, true}) {
            Grouped& g = products.emplace_back();
            g.layer = &layer;
            g.groups = group;
            g.count = groups;
            g.is_down = is_down;
        }
        group += groups;
    }
    products.back().is_last = true;

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
