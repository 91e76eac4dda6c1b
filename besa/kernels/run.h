// One product by the traits of an instruction set: prepares the activations, picks the algorithm and
// shares out the rows. The files sparse_linear_*.cpp include this, and nothing else does.

#pragma once

#include <atomic>
#include <cstdint>

#include "activations.h"
#include "direct.h"
#include "grouped.h"
#include "sparse_linear.h"
#include "tiles.h"
#include "traits.h"

namespace besa {
namespace {

// Has threads take pieces of so many rows until there are none left. A row is never split between
// threads, so results depend on the shape alone.
template <class Product, class Input>
int share_out(const Job& job, const Input& in, int threads,
              std::int64_t rows_per_piece) {
    const std::int64_t pieces = (job.rows + rows_per_piece - 1) / rows_per_piece;
    std::atomic<int> status{kOk};
    std::atomic<std::int64_t> next{0};
    in_lanes(job, threads, [&] {
        const typename Product::Memory memory;
        Product product(job, in, memory);
        if (!product.has_memory()) {
            status = kNoMemory;
            return;
        }
        for (std::int64_t i; (i = next++) < pieces;)
            product.run(i * rows_per_piece, least((i + 1) * rows_per_piece, job.rows));
        if (product.status() != kOk) status = product.status();
    });
    return status;
}

template <class Traits, bool kDense>
int run_as(const Job& job) {
    Activations<Traits> in;
    if (!in.prepare(job)) return kNoMemory;
    const int threads = worthwhile_threads(job, job.rows * job.cols * job.tokens);
    if (job.tokens >= Traits::kTileFrom)
        return share_out<Tiles<Traits, kDense>>(job, in, threads, kRowsPerPiece);
    // Pieces small enough that a thread which the system holds up does not hold up the call, and
    // large enough for long streams.
    const std::int64_t share = (job.rows / (16 * threads) + 15) / 16 * 16;
    return share_out<Direct<Traits, kDense>>(job, in, threads,
                                             share < 16 ? 16 : least(share, 192));
}

template <class Traits>
int run(const Job& job) {
    if (job.grouped) return run_grouped<Traits>(job);
    return job.bitmask ? run_as<Traits, false>(job) : run_as<Traits, true>(job);
}

}  // namespace
}  // namespace besa
