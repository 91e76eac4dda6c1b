// AVX-512 with AMX (Intel since Sapphire Rapids): many tokens are multiplied by registers that are
// matrices. Few are, and so are other types, as in AVX-512 with BF16.

#include <algorithm>

#include "amx_tiles.h"
#include "grouped.h"
#include "sparse_linear_avx512_bf16.h"

namespace besa {
namespace {

struct Bf16Matrices : Bf16Pairs {
    static constexpr int kTileFrom = 7;

    template <int kSums, int kW, int kX>
    BESA_INLINE static void multiply() {
        multiply_bf16<kSums, kW, kX>();
    }
};

// int8 or int4 values with int8 activations, both signed.
template <class Traits>
struct Int8Matrices : Traits {
    using X = std::int8_t;
    using Sum = std::int32_t;
    static constexpr int kTileFrom = 9, kOffset = 0;

    template <int kSums, int kW, int kX>
    BESA_INLINE static void multiply() {
        multiply_int8<kSums, kW, kX>();
    }
};

// A row's sum of so many products of int8 is still an int32.
constexpr std::int64_t kMostInt8Columns = 1 << 17;

template <class Traits, bool kDense>
int run_tiles(const Job& job) {
    BlocksOfJob<Traits> in;
    if (!in.prepare(job)) return kNoMemory;
    const int threads = worthwhile_threads(job, job.rows * job.cols * job.tokens);
    using Product = AmxTiles<Traits, kDense>;
    return share_out<Product>(job, in, threads, Product::rows_per_piece(job, threads));
}

static_assert(kPairsOfBlock == kRegisterRows, "a block of pairs is a register's");

// One thread's part in the product of groups that have many pairs each; returns a Status.
template <class Traits>
int run_grouped_tiles(const Job& job) {
    using X = typename Traits::X;
    using Product = AmxTiles<Traits, false>;
    Grouped& g = *job.grouped;
    const std::int64_t stride = TokenRows<Traits>::stride_of(job.cols);
    const std::int64_t lines = TokenBlocks<Traits>::lines_of(job.cols);
    const auto memory = buffer<X>(kPairsOfBlock * stride);
    // Also without memory all of the phase is to be done: other threads wait for it.
    const int status = memory ? kOk : kNoMemory;
    const TokenBlocks<Traits> in{static_cast<char*>(g.layer->x), g.layer->scale, lines};
    share(g.prepare, blocks_of(g), [&](std::int64_t i) {
        if (!memory) return;
        const Group& group = group_of(g, i);
        const std::int64_t skipped = (g.groups[0].block + i - group.block) * kPairsOfBlock;
        const std::int64_t pair = group.first - first_pair(g) + skipped;
        const std::int64_t count = least(group.end - group.first - skipped, kPairsOfBlock);
        const TokenRows<Traits> rows{memory.get(), in.scale + pair, stride};
        for (std::int64_t t = 0; t < count; ++t)
            rows.make(input_of(g, job, pair + t), job.input_dtype, job.cols, t);
        in.make(i, rows, 0, count);
    });
    const typename Product::Memory tiles;
    const auto rows = [&](const Job& own, const Group& group, std::int64_t first, std::int64_t end) {
        const TokenBlocks<Traits> of_group{in.at(group.block - g.groups[0].block, 0),
                                           in.scale + group.first - first_pair(g), lines};
        return rows_of<Product>(own, of_group, tiles, Product::kMostRows, first, end);
    };
    return std::max(status, multiply_groups(g, job, Product::kTileRows, rows));
}

template <class Traits>
int run_matrices(const Job& job) {
    if (job.grouped) return run_grouped_tiles<Traits>(job);
    if (job.tokens < Traits::kTileFrom) return sparse_linear_avx512_bf16(job);
    return job.bitmask ? run_tiles<Traits, false>(job) : run_tiles<Traits, true>(job);
}

}  // namespace

int sparse_linear_avx512_amx(const Job& job) {
    if (job.grouped && !job.grouped->many) return sparse_linear_avx512_bf16(job);
    if (job.values_dtype == kBf16 && job.input_dtype == kBf16)
        return run_matrices<Bf16Matrices>(job);
    if (job.int8_input && !job.group_size && job.cols <= kMostInt8Columns) {
        if (job.values_dtype == kInt8) return run_matrices<Int8Matrices<Int8Dot>>(job);
        if (job.values_dtype == kInt4)
            switch (job.step_size) {
                case 32: return run_matrices<Int8Matrices<Int4Dot<32>>>(job);
                case 64: return run_matrices<Int8Matrices<Int4Dot<64>>>(job);
                case 128: return run_matrices<Int8Matrices<Int4Dot<128>>>(job);
                default: return run_matrices<Int8Matrices<Int4Dot<0>>>(job);
            }
    }
    return sparse_linear_avx512_bf16(job);
}

}  // namespace besa
