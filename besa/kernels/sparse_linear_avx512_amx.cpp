// AVX-512 with AMX (Intel since Sapphire Rapids): many tokens are multiplied by registers that are
// matrices. Few are, and so are other types, as in AVX-512 with BF16.

#include "amx_tiles.h"
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
    TokenBlocks<Traits> in;
    if (!in.prepare(job)) return kNoMemory;
    const int threads = worthwhile_threads(job, job.rows * job.cols * job.tokens);
    using Product = AmxTiles<Traits, kDense>;
    return share_out<Product>(job, in, threads, Product::rows_per_piece(job, threads));
}

template <class Traits>
int run_matrices(const Job& job) {
    if (job.tokens < Traits::kTileFrom) return sparse_linear_avx512_bf16(job);
    return job.bitmask ? run_tiles<Traits, false>(job) : run_tiles<Traits, true>(job);
}

}  // namespace

int sparse_linear_avx512_amx(const Job& job) {
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
