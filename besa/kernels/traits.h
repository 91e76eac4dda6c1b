// What an instruction set brings to the product.
//
// It has a struct of *traits* for each pair of value and activation type that it multiplies in a way
// of its own, and the loops in direct.h and tiles.h are compiled once for each. Traits derive from
// DefaultTraits, say what is different, and have:
//
//     Value            a packed value                X     an activation, as `dot` wants it
//     W                kStep weights in registers    Acc   sums of products in registers
//     Mask             an unsigned integer of kStep bits
//     Sum              what the lanes of an Acc add up to
//     kStep            weights that are expanded at a time
//     kAccumulators    accumulators that fit in registers beside the rest
//     kTileRows, kTileTokens  the block of a tile's product: that many accumulators
//
//     expand(p, mask, groups, col)  the next popcount(mask) values at p, put to where the mask has
//                      bits, with zeros between; may read kStep values, and kBefore before them;
//                      `groups` scales them if the scales are per group of columns
//     load(p, groups, col)          the same for kStep values without zeros between: a dense weight
//                      (kNibbles: two pointers, to low and to high nibbles; see nibbles.h)
//     count(mask)      its bits
//     dot(acc, w, x)   acc + w * x                   zero()     an Acc of zeros
//     dot_part<i>(acc, w, x)        part i of kParts of that, in its place if kParts > 1
//     add(a, b)        a + b                         sum(acc)   the Sum of all lanes
//     add_sums(acc, to)      adds the sums of 8 accumulators to `to`, if kSumsOf8
//     add_offset(acc, w)     adds what kOffset adds to the products of w, if kOffsetAtRowEnd

#pragma once

#include <cstdint>

#include "common.h"

namespace besa {
namespace {

// The scales of a row whose groups of columns have one each.
struct Groups {
    const float* scale;         // the row's
    const std::uint8_t* steps;  // of a row of int4 values
    std::int64_t last;          // its last group
    int shift;                  // log2 of the group's columns
};

struct DefaultTraits {
    static constexpr bool kInt8Input = false;  // activations are quantized, one scale per token
    static constexpr bool kRawInput = false;   // activations are taken as they are: X is their type
    static constexpr bool kNibbles = false;    // values are int4, two a byte
    static constexpr int kOffset = 0;  // is added to int8 activations, to make them unsigned
    static constexpr bool kOffsetAtRowEnd = false;  // what it adds is taken off a row's sums
    static constexpr bool kSumsOf8 = false;
    static constexpr int kPrefetchBytes = 2048;  // of values, ahead in each row that is read
    static constexpr int kBefore = 0;
    static constexpr int kParts = 1;
    static constexpr int kSplit = 1;      // columns of x of which the even ones lie before the odd ones
    static constexpr int kStreams = 4;    // rows that few tokens are multiplied with at a time
    static constexpr int kLeastRows = 4;  // of them, where that many tokens leave no registers for all
    static constexpr int kTileBytes = 24576;  // half of a first-level cache
    static constexpr int kUnroll = 4;     // independent sums of a single row and token
    static constexpr int kTileFrom = 17;  // tokens from which on tiles were measured to be faster

    template <class Mask>
    static int count(Mask mask) {
        if constexpr (sizeof(Mask) > 4)
            return __builtin_popcountll(mask);
        else
            return __builtin_popcount(mask);
    }
};

// Part kPart of acc + w * x.
template <class Traits, int kPart>
BESA_INLINE inline typename Traits::Acc dot_part(typename Traits::Acc acc,
                                                 const typename Traits::W& w,
                                                 const typename Traits::X* x) {
    if constexpr (Traits::kParts > 1)
        return Traits::template dot_part<kPart>(acc, w, x);
    else
        return Traits::dot(acc, w, x);
}

// acc + w * x, all parts of it.
template <class Traits>
BESA_INLINE inline typename Traits::Acc dot(typename Traits::Acc acc, const typename Traits::W& w,
                                            const typename Traits::X* x) {
    each<Traits::kParts>([&](auto part) BESA_INLINE { acc = dot_part<Traits, part>(acc, w, x); });
    return acc;
}

}  // namespace
}  // namespace besa
