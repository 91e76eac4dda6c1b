// The product for few tokens: weights are expanded in registers and multiplied at once.
//
//     mask       1 0 0 1 0 0 1 0         kStep bits of the row
//     values     a b c | d e f ...       popcount(mask) of them belong to this step
//     weights    a 0 0 b 0 0 c 0         one instruction, or a shuffle by a table
//     token      x x x x x x x x         times each of a few tokens
//     sums       + + + + + + + +         kStep lanes, added up at the end of the row
//
// What limits this is the bytes of the weight that are read. Four rows are read at a time, each from
// another quarter of the thread's piece: four streams keep more reads on their way than one, and the
// four rows share the loads of the activations. With more tokens than there are registers for, there
// are fewer rows at a time, or the row is expanded again for the next few tokens, from the cache.

#pragma once

#include <cstdint>
#include <type_traits>

#include "activations.h"
#include "outputs.h"
#include "packed_rows.h"

namespace besa {
namespace {

template <class Traits, bool kDense>
class Direct {
   public:
    struct Memory {};  // it needs none

    Direct(const Job& job, const TokenRows<Traits>& in, const Memory&)
        : job_(job), in_(in), weight_(job, kStreams) {}

    bool has_memory() const { return weight_.has_memory(); }

    Status status() const { return weight_.status(); }

    // Rows [first, end) of W, times all tokens.
    void run(std::int64_t first, std::int64_t end) {
        const std::int64_t quarter = (end - first) / kStreams;
        std::int64_t r = first;
        for (; r < first + quarter; ++r) {
            std::int64_t t = 0;
            if (job_.tokens == 1) multiply<kStreams, 1, Traits::kUnroll>(r, quarter, t++);
            for (; t + kMost <= job_.tokens; t += kMost) pass<kMost>(r, quarter, t);
            if constexpr (kMost > 4)
                for (; t + 4 <= job_.tokens; t += 4) pass<4>(r, quarter, t);
            if constexpr (kMost == 4)
                for (; t + 3 <= job_.tokens; t += 3) pass<3>(r, quarter, t);
            if constexpr (kMost > 2)
                for (; t + 2 <= job_.tokens; t += 2) pass<2>(r, quarter, t);
            for (; t < job_.tokens; ++t) pass<1>(r, quarter, t);
        }
        for (r += (kStreams - 1) * quarter; r < end; ++r)
            for (std::int64_t t = 0; t < job_.tokens; ++t) multiply<1, 1, 1>(r, 0, t);
    }

   private:
    using Rows = PackedRows<Traits, kDense>;
    using Acc = typename Traits::Acc;
    static constexpr int kStep = Traits::kStep;
    static constexpr int kStreams = Traits::kStreams;  // rows that are read at a time
    static constexpr int kMost = Traits::kAccumulators / Traits::kLeastRows;
    static constexpr bool kSeveralPasses = Traits::kTileFrom > kMost + 1;

    // Rows r, r + quarter and so on, times T tokens: all at once if there are accumulators enough.
    template <int T>
    void pass(std::int64_t r, std::int64_t quarter, std::int64_t t) {
        constexpr int kRows = kStreams * T <= Traits::kAccumulators ? kStreams : Traits::kLeastRows;
        for (int i = 0; i < kStreams; i += kRows) multiply<kRows, T, 1>(r + i * quarter, quarter, t);
    }

    // R rows, `apart` from each other, times T tokens. U steps in turn have sums of their own, so
    // that none waits for the one before it.
    template <int R, int T, int U>
    void multiply(std::int64_t r0, std::int64_t apart, std::int64_t t0) {
        typename Rows::Row row[R];
        each<R>([&](auto r) BESA_INLINE {
            row[r] = weight_.open(r0 + r * apart, r);
            // Tokens that take several passes find a row in the cache from the second pass on; the
            // last one has the time to fetch the row after it.
            if (kSeveralPasses && t0 > 0 && t0 + T == job_.tokens)
                row[r].ahead = weight_.distance_to(r0 + r * apart + 1, row[r]);
        });
        Acc acc[U][R][T], offset[R];
        each<R>([&](auto r) BESA_INLINE {
            offset[r] = Traits::zero();
            each<U>([&](auto u) BESA_INLINE {
                each<T>([&](auto t) BESA_INLINE { acc[u][r][t] = Traits::zero(); });
            });
        });
        const typename Traits::X* x = in_.at(t0, 0);
        const auto step = [&](auto u, std::int64_t col, auto whole) BESA_INLINE {
            each<R>([&](auto r) BESA_INLINE {
                const typename Traits::W w = weight_.template next<whole>(row[r], col);
                if constexpr (Traits::kOffsetAtRowEnd)
                    offset[r] = Traits::add_offset(offset[r], w);
                each<T>([&](auto t) BESA_INLINE {
                    acc[u][r][t] = dot<Traits>(acc[u][r][t], w, x + t * in_.stride + col);
                });
            });
        };
        constexpr std::integral_constant<int, 0> first;
        std::int64_t col = 0;
        for (; col + U * kStep <= job_.cols; col += U * kStep)
            each<U>([&](auto u) BESA_INLINE { step(u, col + u * kStep, std::true_type{}); });
        if (U > 1)
            for (; col + kStep <= job_.cols; col += kStep) step(first, col, std::true_type{});
        if (col < job_.cols) step(first, col, std::false_type{});
        each<R>([&](auto r) BESA_INLINE {
            weight_.close(row[r]);
            each<T>([&](auto t) BESA_INLINE {
                Acc sum = acc[0][r][t];
                each<U - 1>([&](auto u) BESA_INLINE { sum = Traits::add(sum, acc[u + 1][r][t]); });
                if constexpr (Traits::kOffsetAtRowEnd) sum = sum - offset[r];
                float total = static_cast<float>(Traits::sum(sum));
                store_outputs<Traits>(job_, in_.scale, r0 + r * apart, t0 + t, 1, &total);
            });
        });
    }

    const Job& job_;
    const TokenRows<Traits>& in_;
    Rows weight_;
};

}  // namespace
}  // namespace besa
