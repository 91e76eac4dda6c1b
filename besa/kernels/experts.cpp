// Makes the groups of a layer of experts, and starts the threads that multiply them. See grouped.h.

#include "experts.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
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

// The two products of some groups.
struct Products {
    Grouped gate_up, down;
};

// How many groups from the first on have kPairs pairs together, at least one.
std::int64_t taken(const std::vector<Group>& groups, std::size_t first) {
    std::size_t end = first + 1;
    while (end < groups.size() && groups[end].end - groups[first].first <= kPairs) ++end;
    return static_cast<std::int64_t>(end - first);
}

int run(const Experts& layer) {
    const Job &gate_up = layer.gate_up, &down = layer.down;
    const std::int64_t size = float_size(down.input_dtype);
    const Pairs pairs = sorted(layer);
    if (pairs.groups.empty()) {
        if (gate_up.tokens && down.rows) std::memset(down.output, 0, gate_up.tokens * down.rows * size);
        return kOk;
    }
    std::vector<std::unique_ptr<Products>> products;
    std::int64_t most = 0;  // pairs at a time
    for (std::size_t first = 0; first < pairs.groups.size();) {
        const std::int64_t count = taken(pairs.groups, first);
        products.push_back(std::make_unique<Products>());
        for (Grouped* g : {&products.back()->gate_up, &products.back()->down}) {
            g->layer = &layer;
            g->groups = &pairs.groups[first];
            g->count = count;
            g->token = pairs.token.data();
            g->pair = pairs.pair.data();
        }
        products.back()->down.is_down = true;
        first += count;
        const std::int64_t here = pairs.groups[first - 1].end - products.back()->down.groups->first;
        most = here > most ? here : most;
    }
    products.back()->down.is_last = true;

    // Room for activations of any type, and the two cache lines that a row may have more.
    const std::int64_t cols = gate_up.cols > down.cols ? gate_up.cols : down.cols;
    const auto x = buffer<float>(most * (cols + 256)), scale = buffer<float>(most);
    const auto between = buffer<char>(most * gate_up.rows * size);
    const auto outputs = buffer<char>(static_cast<std::int64_t>(pairs.token.size()) * down.rows * size);
    if (!x || !scale || !between || !outputs) return kNoMemory;
    for (const auto& both : products)
        for (Grouped* g : {&both->gate_up, &both->down}) {
            g->x = x.get();
            g->scale = scale.get();
            g->between = between.get();
            g->outputs = outputs.get();
        }

    const std::int64_t weights = gate_up.rows * gate_up.cols + down.rows * down.cols;
    const int threads =
        worthwhile_threads(gate_up, weights * static_cast<std::int64_t>(pairs.token.size()));
    std::atomic<int> status{kOk};
    in_lanes(gate_up, threads, [&] {
        for (const auto& both : products)
            for (const auto& [weight, g] : {std::pair(&gate_up, &both->gate_up),
                                            std::pair(&down, &both->down)}) {
                Job job = *weight;
                job.threads = threads;
                job.grouped = g;
                if (const int result = sparse_linear(job)) status = result;
            }
    });
    return status;
}

}  // namespace

int sparse_experts(const Experts& layer) {
    try {
        return run(layer);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace besa
