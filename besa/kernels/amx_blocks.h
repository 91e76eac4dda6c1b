// What the products for AMX share: activations in blocks of 16 tokens, the expansion of rows, and the
// outputs of a register.
//
// Of x, a token's 64 bytes are wanted as a column of 32-bit words, so it is transposed, once for a
// call. W is as it lies in its rows, 32 bfloat16 or 64 int8 a line of 64 bytes: no weight is laid out
// anew.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "activations.h"
#include "amx.h"
#include "outputs.h"
#include "packed_rows.h"

namespace besa {
namespace {

// X in blocks of 16 tokens: [blocks, lines, 16 words, 16 tokens]. The memory is another's.
template <class Traits>
struct TokenBlocks {
    using X = typename Traits::X;

    char* x;
    float* scale;        // [tokens], if they are quantized to int8
    std::int64_t lines;  // of a token

    static std::int64_t lines_of(std::int64_t cols) {
        const std::int64_t steps = (cols + Traits::kStep - 1) / Traits::kStep;
        return steps * Traits::kStep * static_cast<std::int64_t>(sizeof(X)) / kLine;
    }

    char* at(std::int64_t block, std::int64_t line) const {
        return x + (block * lines + line) * kRegisterBytes;
    }

    // Makes a block of `count` rows from row t on. The last one stands for those that it lacks.
    void make(std::int64_t block, const TokenRows<Traits>& rows, std::int64_t t,
              std::int64_t count) const {
        for (std::int64_t i = 0; i < lines; ++i) {
            const auto token = [&](int r) BESA_INLINE {
                return rows.at(t + least(r, count - 1), i * (kLine / sizeof(X)));
            };
            transpose(token, at(block, i));
        }
    }
};

// X of all tokens of a job. Made once for a call, by all its threads.
template <class Traits>
struct BlocksOfJob : TokenBlocks<Traits> {
    // False if there is no memory.
    bool prepare(const Job& job) {
        if (!rows_.prepare(job)) return false;
        this->scale = rows_.scale;
        this->lines = this->lines_of(job.cols);
        const std::int64_t blocks = (job.tokens + kRegisterRows - 1) / kRegisterRows;
        all_ = buffer<char>(blocks * this->lines * kRegisterBytes);
        if (!all_) return false;
        this->x = all_.get();
        std::atomic<std::int64_t> next{0};
        in_lanes(job, worthwhile_threads(job, job.tokens * job.cols), [&] {
            for (std::int64_t b; (b = next++) < blocks;)
                this->make(b, rows_, b * kRegisterRows, job.tokens - b * kRegisterRows);
        });
        return true;
    }

   private:
    Activations<Traits> rows_;
    Buffer<char> all_;
};

// Expands the next `width` steps of kRows rows, which are `apart` in `rows`, from step s on:
// to(r, i) is where line i of row r goes. Several rows at once keep more reads on their way than one.
template <int kRows, class Rows, class To>
BESA_INLINE inline void expand_lines(const Rows& weight, typename Rows::Row* rows, int apart,
                                     std::int64_t cols, std::int64_t s, std::int64_t width,
                                     const To& to) {
    using W = typename Rows::W;
    constexpr int kLinesOfStep = sizeof(W) / kLine;
    typename Rows::Row row[kRows];  // copies, which stay in registers
    each<kRows>([&](auto r) BESA_INLINE { row[r] = rows[r * apart]; });
    const auto step = [&](std::int64_t i, auto whole) BESA_INLINE {
        each<kRows>([&](auto r) BESA_INLINE {
            const W w = weight.template next<whole>(row[r], (s + i) * Rows::kStep);
            const __m512i* line = reinterpret_cast<const __m512i*>(&w);
            each<kLinesOfStep>([&](auto k) BESA_INLINE {
                _mm512_store_si512(to(r, i * kLinesOfStep + k), line[k]);
            });
        });
    };
    const std::int64_t whole = least(width, cols / Rows::kStep - s);
    for (std::int64_t i = 0; i < whole; ++i) step(i, std::true_type{});
    if (whole < width) step(whole, std::false_type{});
    each<kRows>([&](auto r) BESA_INLINE {
        rows[r * apart].p = row[r].p;
        rows[r * apart].high = row[r].high;
    });
}

// The outputs of `n` rows from r on and of a block from token t on: those of a register's sums.
template <class Traits>
void store_register_outputs(const Job& job, const float* token_scale, std::int64_t r, std::int64_t n,
                            std::int64_t t, const typename Traits::Sum* sums) {
    alignas(kLine) typename Traits::Sum of_token[kRegisterRows][kRegisterRows];
    transpose([&](int i) BESA_INLINE { return sums + i * kRegisterRows; }, of_token);
    for (int i = 0; i < least(kRegisterRows, job.tokens - t); ++i) {
        float values[kRegisterRows];
        std::copy_n(of_token[i], kRegisterRows, values);
        store_outputs<Traits>(job, token_scale, r, t + i,
                              static_cast<int>(least(kRegisterRows, n)), values);
    }
}

}  // namespace
}  // namespace besa
