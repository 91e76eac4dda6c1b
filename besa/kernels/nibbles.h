// int4 values, two a byte.
//
// The columns of a row are taken 64 at a time. The values of the first 64 lie in the low nibbles of
// the row's bytes, those of the next 64 in the high nibbles, and so on in turn:
//
//     columns     0 .. 63   64 .. 127   128 .. 191   192 .. 255   ...
//     nibbles     low       high        low          high
//     bytes       0 1 2 ...             goes on where the low nibbles have got to
//                           0 1 2 ...                goes on where the high ones have got to
//
// So what belongs to 64 columns begins at a byte, wherever that is, and one load and one shift or mask
// give its nibbles in order. A row has as many bytes as the more numerous of its two kinds: the two are
// about as many, as zeros are spread over all columns, and some 1% of the nibbles stay empty.
//
// A nibble holds a whole number from -7 to 7 in two's complement. A weight is that number times the
// step of its group of columns, a whole number from 1 to 18, times the scale of its row. Number times
// step fits a byte, so once expanded these are int8 weights with a scale a row, and sums are int32.
// Instruction sets without a product of their own make int8 values of each row that they open
// (packed_rows.h).

#pragma once

#include <cstdint>

#include "abi.h"

namespace besa {
namespace {

// Columns whose values are in nibbles of one kind.
constexpr std::int64_t kNibbleColumns = 64;

// Number times step, for each step and nibble. Steps above 18 are in no sound file.
struct NibbleSteps {
    alignas(64) std::int8_t of[256][16];

    constexpr NibbleSteps() : of() {
        for (int step = 0; step < 256; ++step)
            for (int nibble = 0; nibble < 16; ++nibble)
                of[step][nibble] =
                    static_cast<std::int8_t>(step * (nibble < 8 ? nibble : nibble - 16));
    }
};

constexpr NibbleSteps kNibbleSteps;

// The bits of 128 columns: those in low nibbles, those in high ones.
struct NibblesMask {
    std::uint64_t low, high;
};

// How many bytes a row of `cols` int4 values takes that has no zeros to leave out.
inline std::int64_t nibble_bytes(std::int64_t cols) {
    const std::int64_t pairs = cols / (2 * kNibbleColumns), rest = cols % (2 * kNibbleColumns);
    return pairs * kNibbleColumns + (rest < kNibbleColumns ? rest : kNibbleColumns);
}

}  // namespace
}  // namespace besa
