// Reads rows of a packed weight, step by step.
//
// A step reads kStep values from wherever the row has got to, although its mask may ask for fewer,
// and may read kBefore values before them. Where that could leave the array, or the row is cut short,
// the row is copied first: whatever masks and row pointers say, nothing out of bounds is touched, and
// what disagrees is reported.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "nibbles.h"
#include "traits.h"

namespace besa {
namespace {

// One thread's view of a weight, packed or dense.
template <class Traits, bool kDense>
class PackedRows {
   public:
    using Value = typename Traits::Value;
    using Mask = typename Traits::Mask;
    using W = typename Traits::W;
    static constexpr int kStep = Traits::kStep;
    static constexpr int kPrefetchBytes = Traits::kPrefetchBytes;
    static constexpr int kBefore = kDense ? 0 : Traits::kBefore;
    // Cache lines that the values of a step are in, at most.
    static constexpr int kStepBytes = kStep * static_cast<int>(sizeof(Value)) / (Traits::kNibbles ? 2 : 1);
    static constexpr int kLines = (kStepBytes + 63) / 64;

    // A row, and how far it is read.
    struct Row {
        const Value* p;
        const Value* begin;
        const std::uint8_t* mask;
        std::int64_t count;    // of its values
        std::uintptr_t ahead;  // bytes from what is read to what is fetched for later
        const Value* high;     // of int4, how far the high nibbles are read; p is of the low ones
        Groups groups;
    };

    // At most `slots` rows are open at a time.
    PackedRows(const Job& job, int slots)
        : job_(job),
          mask_bytes_((job.cols + 7) / 8),
          copies_(buffer<Value>(slots * copy_size())) {
        const std::int64_t size = Traits::kNibbles ? job.step_size : job.group_size;
        if (size) shift_ = __builtin_ctzll(static_cast<std::uint64_t>(size));
        if (from_nibbles()) nibbles_ = buffer<std::uint8_t>(job.cols + 2 * kNibbleColumns);
    }

    bool has_memory() const { return copies_ && (!from_nibbles() || nibbles_); }

    Status status() const { return status_; }

    // Row r from its start, with the use of a slot for a copy.
    Row open(std::int64_t r, int slot) {
        const Value* values = static_cast<const Value*>(job_.values);
        if (from_nibbles()) return open_nibbles(r, slot);
        const std::int64_t begin = begin_of(r), end = begin_of(r + 1);
        Row row{values, values, kDense ? nullptr : job_.bitmask + r * mask_bytes_, 0,
                kPrefetchBytes, nullptr, {}};
        if (begin < 0 || end < begin || end > job_.n_values || end - begin > job_.cols) {
            status_ = kCorrupt;
        } else {
            row.count = end - begin;
            row.p = values + begin;
        }
        if (status_ != kOk || begin < kBefore || begin + job_.cols + kStep > job_.n_values) {
            Value* copy = copies_.get() + slot * copy_size() + kBefore;
            std::copy_n(row.p, row.count, copy);  // not memcpy: values may be null if there are none
            std::memset(copy + row.count, 0, (job_.cols + kStep - row.count) * sizeof(Value));
            row.p = copy;
        }
        row.begin = row.high = row.p;
        if (Traits::kNibbles) {
            const std::int64_t groups = groups_of(job_, job_.step_size);
            row.groups = {nullptr, job_.steps + r * groups, groups - 1, shift_};
        } else if (job_.group_size) {
            const std::int64_t groups = groups_of(job_, job_.group_size);
            row.groups = {job_.scale + r * groups, nullptr, groups - 1, shift_};
        }
        return row;
    }

    // The next kStep weights of a row, or fewer at its end: columns from `col` on.
    template <bool kWhole>
    BESA_INLINE W next(Row& row, std::int64_t col) const {
        each<kLines>([&](auto i) BESA_INLINE {
            __builtin_prefetch(reinterpret_cast<const void*>(address(row.p) + row.ahead + 64 * i));
        });
        if constexpr (Traits::kNibbles) {
            const NibblesMask mask = nibbles_mask<kWhole>(row, col);
            const W w = Traits::expand(row.p, row.high, mask, row.groups, col);
            row.p += __builtin_popcountll(mask.low);
            row.high += __builtin_popcountll(mask.high);
            return w;
        } else if constexpr (kDense && kWhole) {
            const W w = Traits::load(row.p, row.groups, col);
            row.p += kStep;
            return w;
        } else {
            Mask mask;
            if constexpr (kWhole) {
                __builtin_prefetch(row.mask + col / 8 + kPrefetchBytes / 8);
                std::memcpy(&mask, row.mask + col / 8, sizeof(Mask));
            } else
                mask = tail_mask(row, col);
            const W w = Traits::expand(row.p, mask, row.groups, col);
            row.p += Traits::count(mask);
            return w;
        }
    }

    // After the last step: whether the row had as many values as its mask has bits.
    void close(const Row& row) {
        const Value* end = Traits::kNibbles ? std::max(row.p, row.high) : row.p;
        if (end - row.begin != row.count) status_ = kCorrupt;
    }

    // The bytes from where an open row is read to where row r ought to start. For prefetching only.
    std::uintptr_t distance_to(std::int64_t r, const Row& from) const {
        return address(start(r)) - address(from.p);
    }

    static std::uintptr_t address(const Value* p) { return reinterpret_cast<std::uintptr_t>(p); }

   private:
    // Whether int4 values are to be int8 here, for an instruction set that has no product of them.
    bool from_nibbles() const {
        return !kDense && sizeof(Value) == 1 && !Traits::kNibbles && job_.steps;
    }

    // A converted row is written kNibbleColumns values at a time.
    std::int64_t copy_size() const { return kBefore + job_.cols + kStep + kNibbleColumns; }

    // Row r of int4 values as a copy of int8: number times step.
    Row open_nibbles(std::int64_t r, int slot) {
        Value* const copy = copies_.get() + slot * copy_size() + kBefore;
        Row row{copy, copy, job_.bitmask + r * mask_bytes_, 0, kPrefetchBytes, copy, {}};
        if constexpr (!kDense && sizeof(Value) == 1) {
            const std::int64_t begin = job_.row_ptr[r], end = job_.row_ptr[r + 1];
            const std::int64_t room = job_.cols + 2 * kNibbleColumns;
            std::int64_t bytes = end - begin;
            if (begin < 0 || bytes < 0 || end > job_.n_values || bytes > job_.cols) {
                status_ = kCorrupt;
                bytes = 0;
            }
            std::copy_n(static_cast<const std::uint8_t*>(job_.values) + (bytes ? begin : 0), bytes,
                        nibbles_.get());
            std::memset(nibbles_.get() + bytes, 0, room - bytes);
            const std::uint8_t* steps = job_.steps + r * groups_of(job_, job_.step_size);
            std::int64_t used[2] = {0, 0};  // bytes of which the low nibbles are read, the high ones
            for (std::int64_t col = 0; col < job_.cols; col += kNibbleColumns) {
                const int high = col / kNibbleColumns % 2;
                const std::int64_t width = least(kNibbleColumns, job_.cols - col);
                // Values of one chunk may be of two groups.
                for (std::int64_t at = col; at < col + width;) {
                    const std::int64_t size = job_.step_size ? job_.step_size : job_.cols;
                    const std::int64_t stop = least(col + width, (at / size + 1) * size);
                    const std::int64_t count = bits_set(row.mask, at, stop);
                    to_int8(nibbles_.get() + used[high], 4 * high, steps[at / size],
                            copy + row.count);
                    used[high] += count;
                    row.count += count;
                    at = stop;
                }
            }
            if (std::max(used[0], used[1]) != bytes) status_ = kCorrupt;
            std::memset(copy + row.count, 0, copy_size() - kBefore - row.count);
        }
        return row;
    }

    // How many bits are set from column `from`, which begins a byte, up to `to`.
    static std::int64_t bits_set(const std::uint8_t* mask, std::int64_t from, std::int64_t to) {
        std::int64_t count = 0;
        for (std::int64_t i = from / 8; i < to / 8; ++i) count += __builtin_popcount(mask[i]);
        if (to % 8) count += __builtin_popcount(mask[to / 8] & ((1 << to % 8) - 1));
        return count;
    }

    // The next kNibbleColumns numbers times a step; fewer are wanted, but so it is a vector.
    static void to_int8(const std::uint8_t* from, int shift, int step, Value* to) {
        for (int i = 0; i < kNibbleColumns; ++i) {
            const int number = ((from[i] >> shift & 15) ^ 8) - 8;
            to[i] = static_cast<Value>(number * step);
        }
    }

    // Where row r begins among the values.
    std::int64_t begin_of(std::int64_t r) const {
        if constexpr (!kDense) return job_.row_ptr[r];
        return r * (Traits::kNibbles ? nibble_bytes(job_.cols) : job_.cols);
    }

    const Value* start(std::int64_t r) const {
        const Value* values = static_cast<const Value*>(job_.values);
        if (r >= job_.rows) return values;
        const std::int64_t begin = begin_of(r);
        return begin < 0 || begin > job_.n_values ? values : values + begin;
    }

    // The bits of a row's last columns, fewer than kStep.
    Mask tail_mask(const Row& row, std::int64_t col) const {
        Mask mask = static_cast<Mask>(~Mask{0});
        if constexpr (!kDense) {  // byte by byte: what memcpy leaves in memory is slow to load
            mask = 0;
            for (std::int64_t i = mask_bytes_; i-- > col / 8;)
                mask = static_cast<Mask>(mask << 8 | row.mask[i]);
        }
        return static_cast<Mask>(mask & ((Mask{1} << (job_.cols - col)) - 1));
    }

    // The bits of 128 columns of int4 values, or of fewer at a row's end.
    template <bool kWhole>
    BESA_INLINE NibblesMask nibbles_mask(const Row& row, std::int64_t col) const {
        NibblesMask mask{~std::uint64_t{0}, ~std::uint64_t{0}};
        if constexpr (kWhole) {
            if constexpr (!kDense) {
                __builtin_prefetch(row.mask + col / 8 + kPrefetchBytes / 2);
                std::memcpy(&mask, row.mask + col / 8, sizeof(mask));
            }
            return mask;
        }
        if constexpr (!kDense) {
            mask = {0, 0};
            for (std::int64_t i = mask_bytes_; i-- > col / 8;) {
                std::uint64_t& part = i - col / 8 < 8 ? mask.low : mask.high;
                part = part << 8 | row.mask[i];
            }
        }
        const std::int64_t left = job_.cols - col;
        const std::int64_t low = least(left, kNibbleColumns), high = left - low;
        if (low < kNibbleColumns) mask.low &= (std::uint64_t{1} << low) - 1;
        mask.high &= (std::uint64_t{1} << high) - 1;
        return mask;
    }

    const Job& job_;
    std::int64_t mask_bytes_;
    int shift_ = 0;        // log2 of a group's columns
    Buffer<Value> copies_;  // [slots, copy_size()]: rows at the ends of the values, converted ones
    Buffer<std::uint8_t> nibbles_;  // of a row that is converted, with zeros behind
    Status status_ = kOk;
};

}  // namespace
}  // namespace besa
