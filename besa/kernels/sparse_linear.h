// y = x W^T + b, straight from packed weights: what all instruction sets share.
//
// W [rows, cols] is `values` (its nonzeros, row-major), a bitmask with one bit per weight and the
// index of each row's first value. An instruction set brings *traits*, one for each pair of value
// and activation type, and the loops here are compiled once for each of them:
//
//     Value            a packed value                X     an activation as the loops want it
//     W                kStep weights in registers    Acc   sums of products in registers
//     Mask             kStep bits
//     kInt8Input       activations are quantized to int8, one scale per token
//     kRawInput        activations are taken as they are: X is their type
//     kOffset          is added to them, for an instruction that wants them unsigned
//     kLate            what that adds to a row's sums is taken off at the row's end
//     place(j)         where column j of a token lies in its X row
//     kUnroll          independent sums of a single row and token
//     kRegisters       accumulators that fit in registers beside the rest
//     kTileRows, kTileTokens  the block of a tile's product: that many accumulators
//     kTileFrom        the number of tokens from which on tiles are expanded, as was measured
//     add_sums(acc, to)      adds the sums over the lanes of 8 of them to `to`, if kSumsOf8
//     expand(p, m, g, col)   the next popcount(m) values to their places, zeros between; may read
//                            kStep values from p; g scales it if the scales are per group
//     dot(acc, w, x)         acc + w * x              sum(acc)  over all lanes
//
// Few tokens (decode): every row's values are expanded in registers and multiplied at once; what
// limits this is the bytes read. Many tokens (prefill): some columns of a few rows are expanded into
// a tile in the first-level cache, and a register-blocked product of the tile and all tokens
// follows. A row is never split between threads, so results depend on the shape alone.
//
// Values are read at most kStep past a row's own. Where that could leave the array, or the row is
// cut short, the row is copied first: whatever the masks say, nothing out of bounds is touched.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "half.h"

namespace besa {

enum Dtype : int { kBf16 = 0, kFp16 = 1, kFp32 = 2, kInt8 = 3 };

enum Status : int { kOk = 0, kCorrupt = 1, kUnsupported = 2, kNoMemory = 3 };

// One call. Row-major; all memory is the caller's.
struct Job {
    const void* values;
    std::int64_t count;            // of values
    const std::uint8_t* bitmask;   // [rows, ceil(cols / 8)], or null: W is dense
    const std::int64_t* row_ptr;   // [rows + 1], or null with it
    const float* scale;            // null; [rows]; [rows, groups]
    std::int64_t group_size;       // 0: one scale a row
    const void* bias;              // [rows] of input_dtype, or null
    const void* input;             // [tokens, cols]
    void* output;                  // [tokens, rows] of input_dtype
    std::int64_t tokens, rows, cols;
    int values_dtype, input_dtype;
    bool int8_input;               // for int8 values: quantize the activations too
    int threads;                   // at most
    // Runs lane(task) `lanes` times, at once where it can.
    void (*parallel)(void* pool, int lanes, void (*lane)(void*), void* task);
    void* pool;
};

int sparse_linear_portable(const Job& job);
#ifdef __x86_64__
int sparse_linear_avx2(const Job& job);
int sparse_linear_avx512(const Job& job);
int sparse_linear_avx512_bf16(const Job& job);
int sparse_linear_avx512_dpbf16(const Job& job);
#endif

// 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 BF16, 4 the same with dpbf16ps. This CPU has those up to
// `last_isa`, and is fastest with `best_isa`.
int last_isa();
int best_isa();

// The product by an instruction set; returns a Status.
int sparse_linear(const Job& job, int isa);

// How many bytes of values are fetched ahead in each stream of rows.
constexpr int kAhead = 2048;

// Weights times tokens for each thread that is woken: some 4 µs of work, and waking one takes 2.
constexpr std::int64_t kPerThread = 1 << 16;

// Rows that a thread takes at a time for tiles.
constexpr int kPieceRows = 48;

namespace {

struct Groups {
    const float* scale;  // the row's
    std::int64_t last;   // its last group
    int shift;           // log2 of the group's columns
};

inline float load_float(const void* from, int dtype, std::int64_t i) {
    switch (dtype) {
        case kBf16: return bf16_to_float(static_cast<const std::uint16_t*>(from)[i]);
        case kFp16: return fp16_to_float(static_cast<const std::uint16_t*>(from)[i]);
        default: return static_cast<const float*>(from)[i];
    }
}

inline void store_float(void* to, int dtype, std::int64_t i, float value) {
    switch (dtype) {
        case kBf16: static_cast<std::uint16_t*>(to)[i] = float_to_bf16(value); break;
        case kFp16: static_cast<std::uint16_t*>(to)[i] = float_to_fp16(value); break;
        default: static_cast<float*>(to)[i] = value;
    }
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(std::int64_t count) {
    const std::size_t size = (count * sizeof(T) + 63) / 64 * 64 + 64;
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, size)));
}

#define BESA_INLINE __attribute__((always_inline))

template <class F, int... I>
BESA_INLINE inline void each_of(const F& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}

// f(0), ..., f(N - 1), with indices that are constants from the start: arrays of registers that a
// loop variable indexes, even of a loop unrolled later, would live in memory.
template <int N, class F>
BESA_INLINE inline void each(const F& f) {
    each_of(f, std::make_integer_sequence<int, N>{});
}

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Calls lane() `lanes` times on the job's threads. A lane takes what others have left of the work,
// so that it matters to nobody whether they run at once or one after the other.
template <class F>
void in_lanes(const Job& job, int lanes, const F& lane) {
    if (lanes == 1) return lane();
    job.parallel(
        job.pool, lanes, [](void* task) { (*static_cast<const F*>(task))(); },
        const_cast<F*>(&lane));
}

// Activations in the form that Tr::dot wants: [tokens, stride], zeros past cols.
template <class Tr>
struct Input {
    Buffer<typename Tr::X> x;
    Buffer<float> scale;  // per token, for int8
    std::int64_t stride;

    bool prepare(const Job& job) {
        // Rows one cache line apart from a power of two, lest all of them share one set.
        const std::int64_t line = 64 / sizeof(typename Tr::X);
        const std::int64_t padded = (job.cols + Tr::kStep - 1) / Tr::kStep * Tr::kStep;
        stride = (padded + line - 1) / line * line + line;
        x = buffer<typename Tr::X>(job.tokens * stride);
        if (Tr::kInt8Input) scale = buffer<float>(job.tokens);
        if (!x || (Tr::kInt8Input && !scale)) return false;
        std::atomic<std::int64_t> next{0};
        in_lanes(job, job.tokens * job.cols > (1 << 16) ? job.threads : 1, [&] {
            for (std::int64_t t; (t = next++) < job.tokens;) row(job, t);
        });
        return true;
    }

    void row(const Job& job, std::int64_t t) {
        typename Tr::X* to = x.get() + t * stride;
        const std::int64_t tail = job.cols / Tr::kStep * Tr::kStep;
        std::memset(to + tail, 0, (stride - tail) * sizeof(typename Tr::X));
        switch (job.input_dtype) {  // outside of the loops, which are vectors then
            case kBf16: row_from<kBf16>(job, t, to); break;
            case kFp16: row_from<kFp16>(job, t, to); break;
            default: row_from<kFp32>(job, t, to);
        }
    }

    template <int kFrom>
    void row_from(const Job& job, std::int64_t t, typename Tr::X* to) {
        const auto value = [&job, first = t * job.cols](std::int64_t j) {
            return load_float(job.input, kFrom, first + j);
        };
        if constexpr (Tr::kInt8Input) {
            // The bits of sizes are ordered as the sizes are, infinity and NaN above all.
            std::int32_t bits = 0;
            for (std::int64_t j = 0; j < job.cols; ++j) {
                const std::int32_t size = float_to_bits(value(j)) & 0x7FFFFFFF;
                bits = size > bits ? size : bits;
            }
            const bool finite = bits < 0x7F800000;
            const float most = bits_to_float(bits);
            // A token with NaN or Inf has no scale: all that comes of it is NaN.
            scale[t] = finite ? most / 127 : __builtin_nanf("");
            const float inverse = finite && most > 0 ? 127 / most : 0;
            for (std::int64_t j = 0; j < job.cols; ++j) {
                const float scaled = finite ? value(j) * inverse : 0;
                // Ties to even: adding 1.5 * 2^23 leaves no fraction.
                const int whole = static_cast<int>((scaled + 12582912.0f) - 12582912.0f);
                to[Tr::place(j)] = static_cast<typename Tr::X>(whole + Tr::kOffset);
            }
        } else if constexpr (Tr::kRawInput) {
            std::memcpy(to, static_cast<const typename Tr::X*>(job.input) + t * job.cols,
                        job.cols * sizeof(*to));
        } else {
            for (std::int64_t j = 0; j < job.cols; ++j) to[Tr::place(j)] = value(j);
        }
    }
};

// One thread's view of a call.
template <class Tr, bool kDense>
struct Worker {
    using Value = typename Tr::Value;
    using Mask = typename Tr::Mask;
    using W = typename Tr::W;
    using Acc = typename Tr::Acc;
    static constexpr int kStep = Tr::kStep;
    static constexpr int kDirectRows = 4;  // that share the loads of the activations
    static constexpr int kRows = Tr::kTileRows, kTokens = Tr::kTileTokens;
    // A tile is 24 KiB: half of a first-level cache, which the activations pass through too. As many
    // tokens go over it as have the tile's columns in half of a second-level cache.
    static constexpr int kTileSteps = 24576 / (kRows * static_cast<int>(sizeof(W)));
    static constexpr int kChunk =
        (512 << 10) / (kTileSteps * kStep * static_cast<int>(sizeof(typename Tr::X)));
    static_assert(kPieceRows % kRows == 0, "a piece is made of whole tiles");

    const Job& job;
    const Input<Tr>& in;
    Buffer<Value> copies;  // [slots, cols + kStep]: rows at the end of the values
    Buffer<W> tile;        // [kRows, kTileSteps]
    Buffer<typename Tr::Sum> sums;  // [kPieceRows / kRows, kChunk, kRows]: of a piece, so far
    std::int64_t steps, mask_bytes;
    int shift = 0;
    Status status = kOk;

    Worker(const Job& job_, const Input<Tr>& in_) : job(job_), in(in_) {
        steps = (job.cols + kStep - 1) / kStep;
        mask_bytes = (job.cols + 7) / 8;
        for (std::int64_t size = job.group_size; size > 1; size /= 2) ++shift;
    }

    bool prepare() {
        const bool tiles = job.tokens >= Tr::kTileFrom;
        copies = buffer<Value>((tiles ? kPieceRows : kDirectRows) * (job.cols + kStep));
        if (tiles) {
            tile = buffer<W>(kRows * kTileSteps);
            sums = buffer<typename Tr::Sum>(kPieceRows * kChunk);
        }
        return copies && (!tiles || (tile && sums));
    }

    // Rows [first, end) of the product.
    void rows(std::int64_t first, std::int64_t end) {
        if (job.tokens >= Tr::kTileFrom) {
            for (std::int64_t t = 0; t < job.tokens; t += kChunk)
                piece(first, static_cast<int>(end - first), t, least(t + kChunk, job.tokens));
            return;
        }
        // A row from each quarter at a time: four streams keep more reads on their way than one,
        // and the four share the loads of the activations.
        const std::int64_t part = (end - first) / kDirectRows;
        std::int64_t r = first;
        for (; r < first + part; ++r) {
            std::int64_t t = 0;
            if (job.tokens == 1) direct<kDirectRows, 1, Tr::kUnroll>(r, part, t++);
            constexpr int kWide = Tr::kRegisters / kDirectRows;
            for (; t + kWide <= job.tokens; t += kWide) direct<kDirectRows, kWide, 1>(r, part, t);
            if constexpr (kWide > 4)
                for (; t + 4 <= job.tokens; t += 4) direct<kDirectRows, 4, 1>(r, part, t);
            if constexpr (kWide > 2)
                for (; t + 2 <= job.tokens; t += 2) direct<kDirectRows, 2, 1>(r, part, t);
            for (; t < job.tokens; ++t) direct<kDirectRows, 1, 1>(r, part, t);
        }
        for (r += (kDirectRows - 1) * part; r < end; ++r)
            for (std::int64_t t = 0; t < job.tokens; ++t) direct<1, 1, 1>(r, 0, t);
    }

   private:
    struct Row {
        const Value* p;
        const Value* begin;
        const std::uint8_t* mask;
        std::int64_t count;
        std::uintptr_t ahead;  // bytes from what is read to what is fetched for later
        Groups groups;
    };

    // Where a row's values, mask and scales lie; a copy of the values if they may be overrun.
    Row row(std::int64_t r, int slot) {
        const Value* values = static_cast<const Value*>(job.values);
        const std::int64_t begin = kDense ? r * job.cols : job.row_ptr[r];
        const std::int64_t end = kDense ? begin + job.cols : job.row_ptr[r + 1];
        Row row{values, values, kDense ? nullptr : job.bitmask + r * mask_bytes, 0,
                kAhead, {}};
        if (begin < 0 || end < begin || end > job.count || end - begin > job.cols) {
            status = kCorrupt;
        } else {
            row.count = end - begin;
            row.p = values + begin;
        }
        if (status != kOk || begin + job.cols + kStep > job.count) {
            Value* copy = copies.get() + slot * (job.cols + kStep);
            std::copy_n(row.p, row.count, copy);  // of no values there is no address
            std::memset(copy + row.count, 0, (job.cols + kStep - row.count) * sizeof(Value));
            row.p = copy;
        }
        row.begin = row.p;
        if (job.group_size) {
            const std::int64_t groups = (job.cols + job.group_size - 1) / job.group_size;
            row.groups = {job.scale + r * groups, groups - 1, shift};
        }
        return row;
    }

    static std::uintptr_t address(const Value* p) { return reinterpret_cast<std::uintptr_t>(p); }

    // Where a row ought to start: for prefetching only.
    const Value* start(std::int64_t r) const {
        const Value* values = static_cast<const Value*>(job.values);
        if (r >= job.rows) return values;
        const std::int64_t begin = kDense ? r * job.cols : job.row_ptr[r];
        return begin < 0 || begin > job.count ? values : values + begin;
    }

    // The bits of a row's last columns, of which there are fewer than kStep.
    Mask tail_mask(const Row& row, std::int64_t col) const {
        Mask mask = static_cast<Mask>(~Mask{0});
        if constexpr (!kDense) {  // byte by byte: what memcpy leaves in memory is slow to load
            mask = 0;
            for (std::int64_t i = mask_bytes; i-- > col / 8;)
                mask = static_cast<Mask>(mask << 8 | row.mask[i]);
        }
        return static_cast<Mask>(mask & ((Mask{1} << (job.cols - col)) - 1));
    }

    // The next kStep weights of a row, or fewer at its end.
    template <bool kWhole>
    BESA_INLINE W next(Row& row, std::int64_t col) const {
        __builtin_prefetch(reinterpret_cast<const void*>(address(row.p) + row.ahead));
        if constexpr (kDense && kWhole) {
            const W w = Tr::load(row.p, row.groups, col);
            row.p += kStep;
            return w;
        } else {
            Mask mask;
            if constexpr (kWhole) {
                __builtin_prefetch(row.mask + col / 8 + kAhead / 8);
                std::memcpy(&mask, row.mask + col / 8, sizeof(Mask));
            } else
                mask = tail_mask(row, col);
            const W w = Tr::expand(row.p, mask, row.groups, col);
            row.p += Tr::popcount(mask);
            return w;
        }
    }

    void check(const Row& row) {
        if (row.p - row.begin != row.count) status = kCorrupt;
    }

    // Outputs (t, r) to (t, r + n - 1) from the sums of their products. What the types are is asked
    // outside of the loops, which are vectors then.
    BESA_INLINE void finish(std::int64_t r, std::int64_t t, int n, float* values) const {
        if (job.scale && !job.group_size)
            for (int i = 0; i < n; ++i) values[i] *= job.scale[r + i];
        if constexpr (Tr::kInt8Input)
            for (int i = 0; i < n; ++i) values[i] *= in.scale[t];
        switch (job.input_dtype) {
            case kBf16: put<kBf16>(r, t, n, values); break;
            case kFp16: put<kFp16>(r, t, n, values); break;
            default: put<kFp32>(r, t, n, values);
        }
    }

    template <int kTo>
    BESA_INLINE void put(std::int64_t r, std::int64_t t, int n, float* values) const {
        if (job.bias)
            for (int i = 0; i < n; ++i) values[i] += load_float(job.bias, kTo, r + i);
        for (int i = 0; i < n; ++i) store_float(job.output, kTo, t * job.rows + r + i, values[i]);
    }

    // R rows, `apart` from each other, times T tokens; U steps with sums of their own, so that none
    // waits for the last.
    template <int R, int T, int U>
    void direct(std::int64_t r0, std::int64_t apart, std::int64_t t0) {
        Row row_of[R];
        each<R>([&](auto r) BESA_INLINE {
            row_of[r] = row(r0 + r * apart, r);
            // Tokens that take several passes find a row in the cache from the second pass on; the
            // last one has the time to fetch the row after it.
            if (t0 > 0 && t0 + T == job.tokens)
                row_of[r].ahead = address(start(r0 + r * apart + 1)) - address(row_of[r].p);
        });
        Acc acc[U][R][T], offset[R];
        each<R>([&](auto r) BESA_INLINE {
            offset[r] = Tr::zero();
            each<U>([&](auto u) BESA_INLINE {
                each<T>([&](auto t) BESA_INLINE { acc[u][r][t] = Tr::zero(); });
            });
        });
        const typename Tr::X* x = in.x.get() + t0 * in.stride;
        const auto step = [&](auto u, std::int64_t col, auto whole) BESA_INLINE {
            each<R>([&](auto r) BESA_INLINE {
                const W w = next<whole>(row_of[r], col);
                if constexpr (Tr::kLate) offset[r] = Tr::add_offset(offset[r], w);
                each<T>([&](auto t) BESA_INLINE {
                    acc[u][r][t] = Tr::dot(acc[u][r][t], w, x + t * in.stride + col);
                });
            });
        };
        constexpr std::integral_constant<int, 0> first;
        std::int64_t col = 0;
        for (; col + U * kStep <= job.cols; col += U * kStep)
            each<U>([&](auto u) BESA_INLINE { step(u, col + u * kStep, std::true_type{}); });
        if (U > 1)
            for (; col + kStep <= job.cols; col += kStep) step(first, col, std::true_type{});
        if (col < job.cols) step(first, col, std::false_type{});
        each<R>([&](auto r) BESA_INLINE {
            check(row_of[r]);
            each<T>([&](auto t) BESA_INLINE {
                Acc sum = acc[0][r][t];
                each<U - 1>([&](auto u) BESA_INLINE { sum = Tr::add(sum, acc[u + 1][r][t]); });
                if constexpr (Tr::kLate) sum = sum - offset[r];
                float total = static_cast<float>(Tr::sum(sum));
                finish(r0 + r * apart, t0 + t, 1, &total);
            });
        });
    }

    // `n` rows times tokens [t0, t1), tile by tile.
    void piece(std::int64_t r0, int n, std::int64_t t0, std::int64_t t1) {
        Row row_of[kPieceRows];
        Acc offset[kPieceRows];
        const int count = static_cast<int>(t1 - t0), products = count / kTokens;
        for (int r = 0; r < n; ++r) {
            row_of[r] = row(r0 + r, r);
            offset[r] = Tr::zero();
        }
        for (std::int64_t s = 0; s < steps; s += kTileSteps) {
            const int width = static_cast<int>(least(kTileSteps, steps - s));
            for (int r = 0; r < n; r += kRows) {
                // What the next rows will want of this tile, or the first rows of the next one, is
                // fetched meanwhile: a row with each product, and the others before.
                const auto later = [&](int i) -> const Row& { return row_of[(r + i + kRows) % n]; };
                for (int i = 0; i < kRows; ++i) {
                    W* to = tile.get() + i * kTileSteps;
                    if (r + i < n) {
                        Row& one = row_of[r + i];
                        one.ahead = i < products ? 0 : address(later(i).p) - address(one.p);
                        fill(to, one, s, width, offset[r + i]);
                    } else {
                        std::memset(static_cast<void*>(to), 0, width * sizeof(W));
                    }
                }
                const typename Tr::X* x = in.x.get() + t0 * in.stride + s * kStep;
                typename Tr::Sum* to = sums.get() + r * kChunk;
                if (s == 0) std::fill_n(to, count * kRows, 0);
                int t = 0;
                for (int i = 0; i < products; ++i, t += kTokens) {
                    const Row& fetched = later(i % kRows);
                    product<kTokens>(x + t * in.stride, width, to + t * kRows, fetched.p,
                                     fetched.count * sizeof(Value) / steps);
                }
                each<kTokens - 1>([&](auto i) {
                    constexpr int rest = i + 1;
                    if (t + rest == count)
                        product<rest>(x + t * in.stride, width, to + t * kRows, row_of[0].p, 0);
                });
            }
        }
        typename Tr::Sum late[kPieceRows] = {};
        for (int r = 0; r < n; ++r) {
            check(row_of[r]);
            late[r] = Tr::sum(offset[r]);
        }
        for (int t = 0; t < count; ++t) {
            float values[kPieceRows];
            for (int r = 0; r < n; r += kRows) {
                const typename Tr::Sum* from = sums.get() + r * kChunk + t * kRows;
                for (int i = 0; i < kRows; ++i)
                    values[r + i] = static_cast<float>(from[i] - late[r + i]);
            }
            finish(r0, t0 + t, n, values);
        }
    }

    // Expands the next `width` steps of a row. Works on copies, which stay in registers: what is
    // written to the tile could be anything in memory, for all that the compiler knows.
    void fill(W* to, Row& row_in_memory, std::int64_t s, int width, Acc& offset_in_memory) const {
        Row one = row_in_memory;
        Acc offset = offset_in_memory;
        const std::int64_t first = s * kStep;
        const std::int64_t whole = least(width, (job.cols - first) / kStep);
        for (std::int64_t i = 0; i < width; ++i) {
            const std::int64_t col = first + i * kStep;
            const W w = i < whole ? next<true>(one, col) : next<false>(one, col);
            if constexpr (Tr::kLate) offset = Tr::add_offset(offset, w);
            to[i] = w;
        }
        row_in_memory.p = one.p;
        offset_in_memory = offset;
    }

    // Adds the tile times T tokens to their sums, [T, kRows]; meanwhile fetches, so many bytes a step.
    template <int T>
    void product(const typename Tr::X* x, int width, typename Tr::Sum* to, const Value* fetched,
                 std::int64_t bytes) const {
        Acc acc[kRows][T];
        const W* w = tile.get();
        each<kRows>([&](auto r) BESA_INLINE {
            each<T>([&](auto t) BESA_INLINE { acc[r][t] = Tr::zero(); });
        });
        for (int s = 0; s < width; ++s) {
            __builtin_prefetch(reinterpret_cast<const void*>(address(fetched) + s * bytes));
            each<kRows>([&](auto r) BESA_INLINE {
                each<T>([&](auto t) BESA_INLINE {
                    acc[r][t] = Tr::dot(acc[r][t], w[r * kTileSteps + s],
                                        x + t * in.stride + s * kStep);
                });
            });
        }
        constexpr int kEights = Tr::kSumsOf8 ? kRows * T / 8 : 0;
        if constexpr (kEights > 0)
            each<kEights>([&](auto e) BESA_INLINE {
                Acc eight[8];
                each<8>([&](auto i) BESA_INLINE {
                    constexpr int at = 8 * e + i;
                    eight[i] = acc[at % kRows][at / kRows];
                });
                Tr::add_sums(eight, to + 8 * e);
            });
        each<kRows * T - 8 * kEights>([&](auto i) BESA_INLINE {
            constexpr int at = 8 * kEights + i;
            to[at] += Tr::sum(acc[at % kRows][at / kRows]);
        });
    }
};

template <class Tr, bool kDense>
int run_as(const Job& job) {
    Input<Tr> in;
    if (!in.prepare(job)) return kNoMemory;
    const int threads = static_cast<int>(
        least(job.threads, 1 + job.rows * job.cols * job.tokens / kPerThread));
    // Pieces small enough that a thread which the system holds up does not hold up the call, and
    // large enough for long streams.
    const std::int64_t share = (job.rows / (16 * threads) + 15) / 16 * 16;
    const std::int64_t size = job.tokens >= Tr::kTileFrom ? kPieceRows
                              : share < 16                ? 16
                                                          : least(share, 192);
    const std::int64_t pieces = (job.rows + size - 1) / size;
    std::atomic<int> status{kOk};
    std::atomic<std::int64_t> next{0};
    in_lanes(job, threads, [&] {
        Worker<Tr, kDense> worker(job, in);
        if (!worker.prepare()) {
            status = kNoMemory;
            return;
        }
        for (std::int64_t i; (i = next++) < pieces;)
            worker.rows(i * size, least((i + 1) * size, job.rows));
        if (worker.status != kOk) status = worker.status;
    });
    return status;
}

template <class Tr>
int run(const Job& job) {
    return job.bitmask ? run_as<Tr, false>(job) : run_as<Tr, true>(job);
}

}  // namespace
}  // namespace besa
