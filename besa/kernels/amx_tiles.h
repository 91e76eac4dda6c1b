// The product for many tokens on AMX. As in tiles.h, a part of some rows is expanded once and multiplied
// with all tokens, here by registers that are matrices (amx.h):
//
//     sums [16 rows, 16 tokens]  +=  W [16 rows, 64 bytes]  *  x [16 words, 16 tokens]
//
// A tile is 64 rows, four registers, times some lines of 64 bytes. Each register of x is multiplied with
// four of W: five loads for four products, and eight lines of the tile stay in the first-level cache
// for all tokens. The tile as a whole is in the second-level cache, with long parts of each row: what
// limits most products is the expansion, and short parts would be read from memory at half the speed.

#pragma once

#include <algorithm>
#include <cstdint>

#include "amx_blocks.h"

namespace besa {
namespace {

template <class Traits, bool kDense>
class AmxTiles {
   public:
    static constexpr int kTileRows = 4 * kRegisterRows, kMostRows = 4 * kTileRows;
    struct Memory;

    AmxTiles(const Job& job, const TokenBlocks<Traits>& in, const Memory& memory)
        : job_(job), in_(in), weight_(job, kMostRows), memory_(memory) {}

    bool has_memory() const { return weight_.has_memory() && memory_.tile && memory_.sums; }

    Status status() const { return weight_.status(); }

    // Rows [first, end) of W, at most kMostRows, times all tokens.
    void run(std::int64_t first, std::int64_t end) {
        for (std::int64_t t = 0; t < job_.tokens; t += kTokensPerPass)
            run_pass(first, static_cast<int>(end - first), t,
                     least(kTokensPerPass, job_.tokens - t));
    }

    // How many rows a thread is to take at a time. The activations of many tokens come from the
    // third-level cache for each piece, so that there it is large.
    static std::int64_t rows_per_piece(const Job& job, int threads) {
        const std::int64_t share = job.rows / (2 * threads) / kTileRows * kTileRows;
        return job.tokens > kFewTokens && share > kTileRows ? least(share, kMostRows) : kTileRows;
    }

   private:
    using Rows = PackedRows<Traits, kDense>;
    using Row = typename Rows::Row;
    using W = typename Traits::W;
    using Sum = typename Traits::Sum;
    static constexpr int kStep = Traits::kStep;
    static constexpr int kLinesOfStep = sizeof(W) / kLine;
    static constexpr int kRegisters = kTileRows / kRegisterRows;  // of W
    // int4 takes more registers of the processor than there are for several rows at once.
    static constexpr int kAtOnce = Traits::kNibbles ? 1 : kRegisters;
    static constexpr int kRegisterSums = kRegisterRows * kRegisterRows;
    // A tile takes 512 KiB at most, and so do the activations that it is multiplied with, which are
    // used again for the piece's next tile.
    static constexpr int kCachedLines = 8, kMostLines = 128;
    static constexpr int kFewTokens = 64, kTokensPerPass = 1024;

    // `n` rows times tokens [t0, t0 + tokens).
    void run_pass(std::int64_t r0, int n, std::int64_t t0, std::int64_t tokens) {
        const int rows = (n + kTileRows - 1) / kTileRows * kTileRows;
        Row row[kMostRows];  // the last row stands for those that a tile lacks
        for (int r = 0; r < rows; ++r) row[r] = r < n ? weight_.open(r0 + r, r) : row[n - 1];
        const std::int64_t blocks = (tokens + kRegisterRows - 1) / kRegisterRows;
        const std::int64_t across = std::clamp<std::int64_t>(
            kFewTokens / kRegisterRows * kMostLines / blocks / kCachedLines * kCachedLines,
            kCachedLines, kMostLines);
        for (std::int64_t line = 0; line < in_.lines; line += across) {
            const std::int64_t width = least(across, in_.lines - line);
            for (int r = 0; r < rows; r += kTileRows) {
                if (rows > kTileRows)  // fetches what the next tile wants; else rows go straight on
                    for (int i = r; i < r + kTileRows; ++i)
                        row[i].ahead = Rows::address(row[(i + kTileRows) % rows].p) -
                                       Rows::address(row[i].p);
                for (int i = 0; i < kRegisterRows; ++i)
                    expand(row + r + i, memory_.tile.get() + i * kLine, line / kLinesOfStep,
                           width / kLinesOfStep);
                for (std::int64_t i = 0; i < width; i += kCachedLines)
                    for (std::int64_t b = 0; b < blocks; ++b)
                        multiply(memory_.tile.get() + i * kRegisterBytes,
                                 in_.at(t0 / kRegisterRows + b, line + i),
                                 least(kCachedLines, width - i), sums(r, b), line + i == 0);
            }
        }
        for (int r = 0; r < n; ++r) weight_.close(row[r]);
        store(r0, n, t0, tokens);
    }

    // Expands the next `width` steps of a row for each register, from step s on.
    void expand(Row* rows, char* to, std::int64_t s, std::int64_t width) const {
        for (int r = 0; r < kRegisters; r += kAtOnce)
            expand_lines<kAtOnce>(weight_, rows + r * kRegisterRows, kRegisterRows, job_.cols, s, width,
                                  [&](int k, std::int64_t i) BESA_INLINE {
                                      return to + ((r + k) * kMostLines + i) * kRegisterBytes;
                                  });
    }

    // Adds some lines of the tile times a block of tokens to their sums.
    BESA_INLINE void multiply(const char* w, const char* x, std::int64_t lines, Sum* to,
                              bool first) const {
        each<kRegisters>([&](auto r) BESA_INLINE {
            if (first)
                zero_register<r>();
            else
                load_register<r>(to + r * kRegisterSums);
        });
        const char* next = reinterpret_cast<const char*>(to + kRegisters * kRegisterSums);
        for (std::int64_t i = 0; i < lines; ++i) {
            constexpr int kSumLines = kRegisters * kRegisterRows / kCachedLines;
            each<kSumLines>([&](auto k) BESA_INLINE {
                __builtin_prefetch(next + (i * kSumLines + k) * kLine);
            });
            load_register_once<6>(x + i * kRegisterBytes);
            each<kRegisters>([&](auto r) BESA_INLINE {
                load_register<4 + r % 2>(w + (r * kMostLines + i) * kRegisterBytes);
                Traits::template multiply<r, 4 + r % 2, 6>();
            });
        }
        each<kRegisters>(
            [&](auto r) BESA_INLINE { store_register<r>(to + r * kRegisterSums); });
    }

    // The sums of the tile from row r on, and of a block of tokens: those of each register.
    Sum* sums(int r, std::int64_t block) const {
        return memory_.sums.get() + r * kTokensPerPass + block * kTileRows * kRegisterRows;
    }

    // The outputs, once all columns are in the sums.
    void store(std::int64_t r0, int n, std::int64_t t0, std::int64_t tokens) const {
        for (std::int64_t b = 0; b * kRegisterRows < tokens; ++b)
            for (int r = 0; r < n; r += kRegisterRows) {
                const Sum* from =
                    sums(r / kTileRows * kTileRows, b) + r % kTileRows * kRegisterRows;
                store_register_outputs<Traits>(job_, in_.scale, r0 + r, n - r, t0 + b * kRegisterRows,
                                               from);
            }
    }

    const Job& job_;
    const TokenBlocks<Traits>& in_;
    Rows weight_;
    const Memory& memory_;
    AmxRegisters registers_;
};

// What a thread multiplies in: a tile [kRegisters, kMostLines, kRegisterRows, kLine], and the sums so
// far [kMostRows / kTileRows, blocks, kRegisters, kRegisterSums].
template <class Traits, bool kDense>
struct AmxTiles<Traits, kDense>::Memory {
    Buffer<char> tile = buffer<char>(kTileRows * kMostLines * kLine);
    Buffer<Sum> sums = buffer<Sum>(kMostRows * kTokensPerPass);
};

}  // namespace
}  // namespace besa
