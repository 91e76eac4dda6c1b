// Packed weights as the GPU kernels read them: what a record is, and how a warp decodes one.
//
// A weight [rows, cols] is cut into tiles of 16 rows by 64 columns, cols a multiple of 64. A tile is a
// record of bytes, padded to a multiple of 16:
//
//     128 bytes     the mask, a 32-bit word for each lane of a warp
//     2 n bytes     the tile's n values, bfloat16 or float16 (n bytes if they are int8)
//
// Records lie row block by row block, along the columns. `offsets[i]` is where record i begins, in
// units of 16 bytes; one more says where the last one ends. Row blocks come in fours, with masks of
// zeros where the weight has no rows left.
//
// Lane 4 g + t of a warp owns the columns 16 t to 16 t + 15 of rows g and g + 8. With values of 16
// bits, its 32 weights are 8 slots of 4 neighbours: slot (h, s) is row g + 8 h, columns
// 16 t + 4 s + j for j < 4, and weight j of it is bit 8 s + 4 h + j of the lane's word. With int8
// values they are 4 slots of 8: columns 16 t + 8 s + j for j < 8, bit 16 h + 8 s + j. Values are in
// the order of (h, s, lane, j): when a warp reads one slot, its 32 lanes find their values side by
// side, in nearly all of shared memory's banks.
//
// A product does not mind the order of its columns. In this one, the A registers of the tile's i-th
// mma.m16n8k16 are columns 16 t + 4 i to + 3 of both rows, and the B registers of token g are
// x[g][64 tile + 16 t + 4 i ..+3] as they lie in memory.
//
// With 2 of 4 kept, values need no decoding. A record is 1152 bytes: 32 words of metadata, then the
// four A registers of each lane for each of two mma.sp.m16n8k32. Four q of mma j, of 8, is the tile's
// four 8 (q % 2) + 4 j + q / 2, for j = 1 with its columns in the order 2, 3, 0, 1: so that the
// columns 16 t to 16 t + 15 of x, which a lane loads at once, are its own and its neighbour's B
// registers (see `load_x`). Lane 4 g + 2 j + u has the metadata of mma j for fours 4 u to 4 u + 3: in
// its low half row g, in its high half row g + 8, four bits for each, the lower index first.
#pragma once

#include "device.cuh"

constexpr int MASK_BYTES = 128, TWO_FOUR_BYTES = 1152;

// Bits set in each nibble of a lane's word: count[h] has slots (h, 0) to (h, 3) in its bytes.
DEVICE void count_nibbles(uint32_t mask, uint32_t (&count)[2]) {
    uint32_t v = mask - ((mask >> 1) & 0x55555555u);
    v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
    count[0] = v & 0x0F0F0F0Fu;
    count[1] = (v >> 4) & 0x0F0F0F0Fu;
}

// Sums over the lanes up to this one: of 32 lanes with 4 at most, they fit a byte.
DEVICE void scan(uint32_t (&sum)[2]) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        sum[0] = scan_step(sum[0], distance);
        sum[1] = scan_step(sum[1], distance);
    }
}

// What a lane knows of a tile before it reads values. Counts are bytes, slots (h, 0) to (h, 3).
struct Tile {
    uint32_t mask;
    uint32_t before[2];  // [h]: values of the slot in the lanes below
    uint32_t upto[2];    // [h]: and in this one
    uint32_t begin[8];   // [4 h + s]: where the slot's values begin in shared memory, in bytes
};

// The tile of 16-bit values whose record lies at `record` in shared memory.
DEVICE Tile locate(uint32_t record, int lane) {
    Tile tile;
    tile.mask = *reinterpret_cast<const uint32_t*>(shared_memory() + record + 4 * lane);
    uint32_t count[2];
    count_nibbles(tile.mask, count);
    tile.upto[0] = count[0], tile.upto[1] = count[1];
    scan(tile.upto);
    tile.before[0] = tile.upto[0] - count[0], tile.before[1] = tile.upto[1] - count[1];
    uint32_t all[2] = {__shfl_sync(~0u, tile.upto[0], 31), __shfl_sync(~0u, tile.upto[1], 31)};
    tile.begin[0] = record + MASK_BYTES;
    tile.begin[4] = dot4(all[0], 0x02020202u, tile.begin[0]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        tile.begin[4 * h + 1] = dot4(all[h], 0x00000002u, tile.begin[4 * h]);
        tile.begin[4 * h + 2] = dot4(all[h], 0x00000202u, tile.begin[4 * h]);
        tile.begin[4 * h + 3] = dot4(all[h], 0x00020202u, tile.begin[4 * h]);
    }
    return tile;
}

// Weights 2 PAIR and 2 PAIR + 1 of slot (H, S), 16 bits each. If the second one is there, it is value
// q of the slot, and the first one, if there, is value q - 1. Both are read in any case, which may be
// two bytes before the record or behind it, and what is not there is blanked.
template <int H, int S, int PAIR>
DEVICE uint32_t fetch_pair(const Tile& tile) {
    // q for each slot in a byte, of which the multiplication below takes one.
    constexpr int FIRST = 4 * H + 2 * PAIR;  // the pair's bits in byte S of the mask
    uint32_t q = PAIR ? tile.upto[H] - ((tile.mask >> (FIRST + 1)) & 0x01010101u)
                      : tile.before[H] + ((tile.mask >> FIRST) & 0x01010101u);
    uint32_t at = dot4(q, 2u << (8 * S), tile.begin[4 * H + S]);
    uint32_t low = *reinterpret_cast<const uint16_t*>(shared_memory() + at - 2);
    uint32_t high = *reinterpret_cast<const uint16_t*>(shared_memory() + at);
    // Each bit at the top of its byte, whose sign `permute` then spreads over 16 bits.
    constexpr uint32_t SPREAD = (8 | S) * 0x0011u | (8 | 4 | S) * 0x1100u;
    uint32_t there = permute(tile.mask << (7 - FIRST), tile.mask << (6 - FIRST), SPREAD);
    return join(low, high) & there;
}

// The A registers of the tile's I-th mma.m16n8k16.
template <int I>
DEVICE void fetch4(const Tile& tile, uint32_t (&a)[4]) {
    a[0] = fetch_pair<0, I, 0>(tile);
    a[1] = fetch_pair<1, I, 0>(tile);
    a[2] = fetch_pair<0, I, 1>(tile);
    a[3] = fetch_pair<1, I, 1>(tile);
}

// Selectors for `permute`, by the mask of four weights: they spread four bytes in a row to where the
// weights are, and put byte 4 of a zero word elsewhere. 64 bytes, from the first ones of a block's
// shared memory on.
DEVICE void make_selectors(int thread) {
    if (thread >= 16) return;
    uint32_t selector = 0, next = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) selector |= (thread >> j & 1 ? next++ : 4u) << (4 * j);
    reinterpret_cast<uint32_t*>(shared_memory())[thread] = selector;
}

// What a lane knows of a tile of int8 values. Counts are bytes, slots (0, 0), (0, 1), (1, 0), (1, 1).
struct ByteTile {
    uint32_t mask;
    uint32_t before;    // values of the slot in the lanes below
    uint32_t skip;      // bits that the slot's first four weights take
    uint32_t begin[4];  // where the slot's values begin in shared memory
};

DEVICE ByteTile locate_bytes(uint32_t record, int lane) {
    ByteTile tile;
    tile.mask = *reinterpret_cast<const uint32_t*>(shared_memory() + record + 4 * lane);
    uint32_t v = tile.mask - ((tile.mask >> 1) & 0x55555555u);
    v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
    tile.skip = (v & 0x07070707u) * 8;
    uint32_t count = (v & 0x0F0F0F0Fu) + ((v >> 4) & 0x0F0F0F0Fu), sum = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum = scan_step(sum, distance);
    // The last lane's sum may be 256, one more than a byte holds; taking its own 8 off mends that.
    tile.before = sum - count;
    uint32_t before = __shfl_sync(~0u, tile.before, 31), last = __shfl_sync(~0u, count, 31);
    tile.begin[0] = record + MASK_BYTES;
#pragma unroll
    for (int slot = 1; slot < 4; ++slot) {
        uint32_t own = 1u << (8 * (slot - 1));
        tile.begin[slot] = dot4(last, own, dot4(before, own, tile.begin[slot - 1]));
    }
    return tile;
}

// The int8 weights of slot SLOT = 2 h + s, after `make_selectors`: columns 0 to 3 and 4 to 7 of it.
template <int SLOT>
DEVICE void fetch_bytes(const ByteTile& tile, uint32_t& first, uint32_t& second) {
    uint32_t at = dot4(tile.before, 1u << (8 * SLOT), tile.begin[SLOT]);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(shared_memory() + (at & ~3u));
    uint32_t low = __funnelshift_r(words[0], words[1], at * 8);  // a window of eight values
    uint32_t high = __funnelshift_r(words[1], words[2], at * 8);
    auto selector = [&](int bit) {  // of the four weights from a bit of the mask on
        uint32_t entry = (bit < 2 ? tile.mask << 2 : tile.mask >> (bit - 2)) & 0x3Cu;
        return *reinterpret_cast<const uint32_t*>(shared_memory() + entry);
    };
    first = permute(low, 0, selector(8 * SLOT));
    uint32_t rest = __funnelshift_rc(low, high, tile.skip >> (8 * SLOT) & 0xFFu);
    second = permute(rest, 0, selector(8 * SLOT + 4));
}

// Four int8 weights as 16-bit floats, exactly: 2^23 + 128 + w has w + 128 in its lowest byte.
template <class T>
DEVICE void widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
    uint32_t shifted = bytes ^ 0x80808080u;
    float w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        w[j] = float_of_bits(permute(shifted, 0x4B000000u, 0x7540u | j)) - 8388736.0f;
    low = pack2(T(), w[0], w[1]);
    high = pack2(T(), w[2], w[3]);
}
