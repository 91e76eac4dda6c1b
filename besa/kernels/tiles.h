// The product for many tokens: weights are expanded once for all of them, tile by tile.
//
//                      cols
//          +------+------+------+------+        a piece: kRowsPerPiece rows of W, one thread's work
//          | tile | next |      |      |        a tile: kTileRows of them times kTileSteps steps,
//          +------+------+------+------+                expanded, in the first-level cache
//     rows |below |      |      |      |
//          +------+------+------+------+        Tiles go down the piece, then on to the next
//          |      |      |      |      |        columns; sums of all rows and tokens are kept.
//          +------+------+------+------+
//
//          +------+     +------+
//          | tile |  x  |tokens|^T   =>  sums [tokens, rows]
//          +------+     +------+
//
// A tile is multiplied with kTileTokens tokens at a time: kTileRows times kTileTokens accumulators,
// all in registers, go along the columns, and each load serves several products.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activations.h"
#include "outputs.h"
#include "packed_rows.h"

namespace besa {
namespace {

// Rows that a thread takes at a time.
constexpr int kRowsPerPiece = 48;

template <class Traits, bool kDense>
class Tiles {
   public:
    struct Memory;

    Tiles(const Job& job, const TokenRows<Traits>& in, const Memory& memory)
        : job_(job), in_(in), weight_(job, kRowsPerPiece), memory_(memory) {}

    bool has_memory() const { return weight_.has_memory() && memory_.tile && memory_.sums; }

    Status status() const { return weight_.status(); }

    // Rows [first, end) of W, at most a piece, times all tokens.
    void run(std::int64_t first, std::int64_t end) {
        for (std::int64_t t = 0; t < job_.tokens; t += kTokensPerPass)
            run_pass(first, static_cast<int>(end - first), t,
                     least(t + kTokensPerPass, job_.tokens));
    }

   private:
    using Rows = PackedRows<Traits, kDense>;
    using Row = typename Rows::Row;
    using Value = typename Traits::Value;
    using X = typename Traits::X;
    using W = typename Traits::W;
    using Acc = typename Traits::Acc;
    using Sum = typename Traits::Sum;
    static constexpr int kStep = Traits::kStep;
    static constexpr int kTileRows = Traits::kTileRows, kTileTokens = Traits::kTileTokens;
    // A tile leaves half of a first-level cache to the activations, which pass through it too. As many
    // tokens go over a tile as have its columns in half of a second-level cache.
    static constexpr int kTileSteps =
        Traits::kTileBytes / (kTileRows * static_cast<int>(sizeof(W)));
    static constexpr int kTokensPerPass =
        (512 << 10) / (kTileSteps * kStep * static_cast<int>(sizeof(X)));
    static_assert(kRowsPerPiece % kTileRows == 0, "a piece is made of whole tiles");

    // `n` rows times tokens [t0, t1).
    void run_pass(std::int64_t r0, int n, std::int64_t t0, std::int64_t t1) {
        Row row[kRowsPerPiece];
        Acc offset[kRowsPerPiece];
        const int tokens = static_cast<int>(t1 - t0), products = tokens / kTileTokens;
        for (int r = 0; r < n; ++r) {
            row[r] = weight_.open(r0 + r, r);
            offset[r] = Traits::zero();
        }
        const std::int64_t steps = (job_.cols + kStep - 1) / kStep;
        for (std::int64_t s = 0; s < steps; s += kTileSteps) {
            const int width = static_cast<int>(least(kTileSteps, steps - s));
            for (int r = 0; r < n; r += kTileRows) {
                // What the next rows will want of this tile, or the first rows of the next one, is
                // fetched meanwhile: a row with each product, and the others before.
                const auto later = [&](int i) -> const Row& { return row[(r + i + kTileRows) % n]; };
                for (int i = 0; i < kTileRows; ++i) {
                    W* to = memory_.tile.get() + i * kTileSteps;
                    if (r + i < n) {
                        Row& one = row[r + i];
                        one.ahead = i < products
                                        ? 0
                                        : Rows::address(later(i).p) - Rows::address(one.p);
                        expand_row(to, one, s, width, offset[r + i]);
                    } else {
                        std::memset(static_cast<void*>(to), 0, width * sizeof(W));
                    }
                }
                const X* x = in_.at(t0, s * kStep);
                Sum* to = memory_.sums.get() + r * kTokensPerPass;
                if (s == 0) std::fill_n(to, tokens * kTileRows, 0);
                int t = 0;
                for (int i = 0; i < products; ++i, t += kTileTokens) {
                    const Row& fetched = later(i % kTileRows);
                    multiply<kTileTokens>(x + t * in_.stride, width, to + t * kTileRows, fetched.p,
                                          fetched.count * sizeof(Value) / steps);
                }
                each<kTileTokens - 1>([&](auto i) {
                    constexpr int rest = i + 1;
                    if (t + rest == tokens)
                        multiply<rest>(x + t * in_.stride, width, to + t * kTileRows, row[0].p, 0);
                });
            }
        }
        store(row, offset, r0, n, t0, tokens);
    }

    // Expands the next `width` steps of a row. Works on copies, which stay in registers: the compiler
    // has to assume that a write to the tile changes anything else in memory.
    void expand_row(W* to, Row& row_in_memory, std::int64_t s, int width,
                    Acc& offset_in_memory) const {
        Row one = row_in_memory;
        Acc offset = offset_in_memory;
        const std::int64_t first = s * kStep;
        const std::int64_t whole = least(width, (job_.cols - first) / kStep);
        for (std::int64_t i = 0; i < width; ++i) {
            const std::int64_t col = first + i * kStep;
            const W w = i < whole ? weight_.template next<true>(one, col)
                                  : weight_.template next<false>(one, col);
            if constexpr (Traits::kOffsetAtRowEnd) offset = Traits::add_offset(offset, w);
            to[i] = w;
        }
        row_in_memory.p = one.p;
        row_in_memory.high = one.high;
        offset_in_memory = offset;
    }

    // Adds the tile times T tokens to their sums, [T, kTileRows]; meanwhile fetches `bytes` a step.
    template <int T>
    void multiply(const X* x, int width, Sum* to, const Value* fetched, std::int64_t bytes) const {
        Acc acc[kTileRows][T];
        const W* w = memory_.tile.get();
        each<kTileRows>([&](auto r) BESA_INLINE {
            each<T>([&](auto t) BESA_INLINE { acc[r][t] = Traits::zero(); });
        });
        for (int s = 0; s < width; ++s) {
            __builtin_prefetch(reinterpret_cast<const void*>(Rows::address(fetched) + s * bytes));
            // A part goes through all rows and tokens before the next one does: of a step of several
            // registers only one is needed at a time.
            each<Traits::kParts>([&](auto part) BESA_INLINE {
                each<kTileRows>([&](auto r) BESA_INLINE {
                    each<T>([&](auto t) BESA_INLINE {
                        acc[r][t] = dot_part<Traits, part>(acc[r][t], w[r * kTileSteps + s],
                                                           x + t * in_.stride + s * kStep);
                    });
                });
            });
        }
        constexpr int kEights = Traits::kSumsOf8 ? kTileRows * T / 8 : 0;
        if constexpr (kEights > 0)
            each<kEights>([&](auto e) BESA_INLINE {
                Acc eight[8];
                each<8>([&](auto i) BESA_INLINE {
                    constexpr int at = 8 * e + i;
                    eight[i] = acc[at % kTileRows][at / kTileRows];
                });
                Traits::add_sums(eight, to + 8 * e);
            });
        each<kTileRows * T - 8 * kEights>([&](auto i) BESA_INLINE {
            constexpr int at = 8 * kEights + i;
            to[at] += Traits::sum(acc[at % kTileRows][at / kTileRows]);
        });
    }

    // The outputs, once all columns are in the sums.
    void store(const Row* row, const Acc* offset, std::int64_t r0, int n, std::int64_t t0,
               int tokens) {
        Sum offsets[kRowsPerPiece] = {};
        for (int r = 0; r < n; ++r) {
            weight_.close(row[r]);
            offsets[r] = Traits::sum(offset[r]);
        }
        for (int t = 0; t < tokens; ++t) {
            float values[kRowsPerPiece];
            for (int r = 0; r < n; r += kTileRows) {
                const Sum* from = memory_.sums.get() + r * kTokensPerPass + t * kTileRows;
                for (int i = 0; i < kTileRows; ++i)
                    values[r + i] = static_cast<float>(from[i] - offsets[r + i]);
            }
            store_outputs<Traits>(job_, in_.scale, r0, t0 + t, n, values);
        }
    }

    const Job& job_;
    const TokenRows<Traits>& in_;
    Rows weight_;
    const Memory& memory_;
};

// What a thread multiplies in: a tile [kTileRows, kTileSteps], and the sums so far
// [kRowsPerPiece / kTileRows, kTokensPerPass, kTileRows].
template <class Traits, bool kDense>
struct Tiles<Traits, kDense>::Memory {
    Buffer<W> tile = buffer<W>(kTileRows * kTileSteps);
    Buffer<Sum> sums = buffer<Sum>(kRowsPerPiece * kTokensPerPass);
};

}  // namespace
}  // namespace besa
