// What the products of many tokens have in common: matmul.cu and matmul_multicast.cu.
#pragma once

#include "hopper.cuh"
#include "records.cuh"

// Of one token and 64 columns of x, 16 bits each; of a record, five pieces of 512 bytes at most.
constexpr int ROW_BYTES = 128, PIECES = 5;

struct Problem {
    const char* records;
    const int* offsets;
    const void* x;     // T [tokens, cols], 16-byte aligned, cols a multiple of 64; or by `arrange`
    const void* bias;  // T [rows], or null
    void* y;           // T [tokens, rows], 8-byte aligned
    int rows, cols, tokens;
    int capacity;  // bytes of the largest record
    int sharing;   // blocks that share x, in matmul_multicast.cu: 1, 2, 4 or 8
};

// ---------------------------------------------------------------- records of a warp

// The records of a warp's row block for the tiles that its thread block has, on their way through a ring
// of STAGES in shared memory. One more is KEPT if a tile is located before the values of the one before
// it are fetched: the long way from a mask to addresses then overlaps with reading, where few warps of
// a multiprocessor do.
template <int STAGES, int KEPT>
struct Ring {
    const char* records;
    const int* offsets;  // of the first tile's record
    int steps;           // tiles; 0 if the weight has no such rows
    int capacity, lane;
    uint32_t at;     // bytes of shared memory
    uint32_t to;     // the address of this lane's first 16 bytes
    int stage;       // of the next tile to decode
    int begin, end;  // of the next record to send for, in units of 16 bytes
};

// Sends for the record of tile `step`, if there is one, and for the end of the next one: that is not
// needed before the next call. `zero` is 0, and known to be so after what it is made of.
template <int STAGES, int KEPT>
DEVICE void send(Ring<STAGES, KEPT>& ring, int step, int stage, int zero = 0) {
    const int size = ring.end - ring.begin - ring.lane - zero;
    const char* from = once(ring.records + (int64_t(ring.begin) + ring.lane) * 16);
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
        if (32 * i < size) copy16(ring.to + stage * ring.capacity + 512 * i, from + 512 * i);
    commit();
    ring.begin = ring.end;
    ring.end = __ldg(ring.offsets + min(step + 2, ring.steps));
}

// A ring at `at` for row block `row_block` of a weight of `rows`, tiles `first` to `first + steps`
// of its tiles; all that has room has been sent for.
template <int STAGES, int KEPT>
DEVICE Ring<STAGES, KEPT> make_ring(const Problem& p, uint32_t at, int row_block, int first, int steps) {
    const int lane = threadIdx.x % 32;
    const bool there = row_block < (p.rows + 63) / 64 * 4;
    const int* offsets = p.offsets + (there ? int64_t(row_block) * (p.cols / 64) + first : 0);
    if (!there) {  // no records, and a mask of zeros for every step
        steps = 0;
#pragma unroll
        for (int i = 0; i < STAGES; ++i)
            *reinterpret_cast<uint32_t*>(shared_memory() + at + i * p.capacity + 4 * lane) = 0;
    }
    Ring<STAGES, KEPT> ring = {
        p.records, offsets, steps, p.capacity, lane, at,
        shared_address(shared_memory()) + at + lane * 16, 0, __ldg(offsets),
        __ldg(offsets + min(1, steps))};
#pragma unroll
    for (int i = 0; i < STAGES - 1 - KEPT; ++i) send(ring, i, i);
    return ring;
}

// Tile `step`, the next one; and sends for the one that takes the place of the last one fetched. With
// `summed`, that waits for the sums over the lanes, whose top bits are 0: these then come before the
// wait for a product, which the compiler else puts first, so that nothing overlaps.
template <int STAGES, int KEPT>
DEVICE Tile next_tile(Ring<STAGES, KEPT>& ring, int step, bool summed) {
    wait<STAGES - 2 - KEPT>();
    __syncwarp();
    Tile tile = locate(ring.at + ring.stage * ring.capacity, ring.lane);
    int done = ring.stage - 1 - KEPT;
    int zero = summed ? int((tile.upto[0] | tile.upto[1]) >> 31) : 0;
    send(ring, step + STAGES - 1 - KEPT, done < 0 ? done + STAGES : done, zero);
    ring.stage = ring.stage + 1 == STAGES ? 0 : ring.stage + 1;
    return tile;
}

template <int HALF>
DEVICE void fetch_half(const Tile& tile, uint32_t (&a)[4][4]) {
    fetch4<2 * HALF>(tile, a[2 * HALF]);
    fetch4<2 * HALF + 1>(tile, a[2 * HALF + 1]);
}

// ---------------------------------------------------------------- products

// Adds the product of a tile by x at a `shared_address`, under way until `products_wait`.
template <class T, int N>
DEVICE void multiply_tile(float (&sum)[N / 64][32], const uint32_t (&a)[4][4], uint32_t x) {
    const uint64_t rows = swizzled_rows(x);
    products_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int n = 0; n < N / 64; ++n)
            wgmma(T(), sum[n], a[i], next(rows, 32 * i + 64 * ROW_BYTES * n));
    products_commit();
}

DEVICE void keep_all(uint32_t (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) keep(a[i]);
}

// ---------------------------------------------------------------- sums of a cluster

// y of this block's tokens that are its share: the sums of blocks `first`, `first + stride`, ... of the
// cluster, `ranks` in all, of which this is number `rank`, in this order. All have their sums at byte
// `at` of shared memory, a multiple of 16, and none needs what was there.
template <class T, int WARPGROUPS, int N>
DEVICE void add_and_write(const Problem& p, const float (&sum)[N / 64][32], uint32_t at, int token0,
                          int row0, int rank, int ranks, int first, int stride) {
    // A token is a row of PITCH numbers, which keeps the stores below free of bank conflicts.
    constexpr int THREADS = WARPGROUPS * 128, ROWS = WARPGROUPS * 64, PITCH = ROWS + 4, MOST = 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    __syncthreads();
    float* own = reinterpret_cast<float*>(shared_memory() + at);
#pragma unroll
    for (int n = 0; n < N / 64; ++n)
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            int token = 64 * n + 8 * (i / 4) + 2 * t + i % 2, row = 16 * warp + g + 8 * (i / 2 % 2);
            own[token * PITCH + row] = sum[n][i];
        }
    cluster_barrier();
    const uint16_t* bias = static_cast<const uint16_t*>(p.bias);
    const int tokens = min(N, p.tokens - token0);
    for (int i = threadIdx.x;; i += THREADS) {
        int token = i / (ROWS / 4) * ranks + rank, row = i % (ROWS / 4) * 4;
        if (token >= tokens) break;
        if (row0 + row >= p.rows) continue;
        uint32_t from = shared_address(own + token * PITCH + row);
        float4 parts[MOST];
#pragma unroll
        for (int r = 0; r < MOST; ++r)
            if (r == rank)
                parts[r] = *reinterpret_cast<const float4*>(own + token * PITCH + row);
            else
                parts[r] = r < ranks ? load_of_block(from, first + stride * r)
                                     : make_float4(0, 0, 0, 0);
        float value[4] = {};
#pragma unroll
        for (int r = 0; r < MOST; ++r) {
            value[0] += parts[r].x, value[1] += parts[r].y;
            value[2] += parts[r].z, value[3] += parts[r].w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (bias != nullptr && row0 + row + j < p.rows)
                value[j] += unpack(T(), bias[row0 + row + j]);
        uint16_t* y = static_cast<uint16_t*>(p.y) + int64_t(token0 + token) * p.rows + row0 + row;
        uint2 words = make_uint2(pack2(T(), value[0], value[1]), pack2(T(), value[2], value[3]));
        if (p.rows % 4 == 0) {
            *reinterpret_cast<uint2*>(y) = words;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (row0 + row + j < p.rows)
                    y[j] = uint16_t((j < 2 ? words.x : words.y) >> (16 * (j % 2)));
        }
    }
    cluster_barrier_after_reading();  // the others may still need this block's memory
}
