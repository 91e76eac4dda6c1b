// y = x W^T + bias for some 65 tokens and more, with W as records: matmul.cu with less traffic; sm_90a.
//
// Where every block reads all of its tokens of x, L2 is what limits 256 tokens: 128 rows of W take 2 MB
// of x beside 0.6 MB of records. So C blocks of a cluster, with other rows each, take the same part of
// x: each copies a C-th of it to the shared memory of all (multicast), which costs L2 one read.
//
// Such copies keep the order of bytes, so `arrange` has written x in the order of shared memory before:
// for 64 tokens and a tile of 64 columns 8192 bytes, rows of 128 with the swizzle of `swizzled_rows`,
// their columns in the order of the A registers (see matmul.cu). That is one pass over x, which products
// of the same x can share.
//
// The warps do not meet at every tile: x has X_BUFFERS, each with a barrier that says it is full (all
// bytes are there) and one that says it is free (all warps of the C blocks have multiplied by it). Warp
// 0 sends for x.
//
// With more than 128 tokens their sums leave room for no more than 8 warps of a multiprocessor. Then a
// warp does more at a time: DOUBLE sets of A registers, so that it decodes the next tile while one is
// multiplied, and KEPT, a tile more that is located meanwhile (see matmul.cuh).
//
// A launch has the grid (C * splits, tokens / N, rows / (64 WARPGROUPS) / C), rounded up, in clusters of
// C * splits: as in matmul.cu, `splits` blocks share the columns.
#include "matmul.cuh"

struct Arrangement {
    const void* x;   // 16 bits each, [tokens, cols]
    void* arranged;  // [tokens / 64 rounded up, cols / 64, 64, 128 bytes]
    int cols, tokens;
};

// A thread writes 16 bytes; the grid is (cols / 64, tokens / 32 rounded up).
KERNEL(256, 8) arrange(const Arrangement p) {
    start_next();
    const int tile = blockIdx.x, tiles = gridDim.x;
    const int token = blockIdx.y * 32 + threadIdx.x / 8, row = token % 64;
    if (token >= p.tokens) return;
    wait_for_previous();
    // Chunk 2 i + h has columns 16 t + 4 i + 2 h and the next one, for each t.
    const int chunk = threadIdx.x % 8 ^ row % 8;
    const uint32_t* from = static_cast<const uint32_t*>(p.x) +
                           (int64_t(token) * p.cols + tile * 64 + 2 * chunk) / 2;
    int64_t to = (int64_t(token / 64) * tiles + tile) * 512 + row * 8 + threadIdx.x % 8;
    static_cast<uint4*>(p.arranged)[to] = make_uint4(from[0], from[8], from[16], from[24]);
}

template <class T, int WARPGROUPS, int N, int STAGES, int BLOCKS>
KERNEL(WARPGROUPS * 128, BLOCKS) matmul(const Problem p) {
    constexpr int ROWS = WARPGROUPS * 64, X_BYTES = N * ROW_BYTES, PIECE = 64 * ROW_BYTES;
    constexpr int DOUBLE = N > 128, KEPT = DOUBLE;
    // A tile of x is sent for AHEAD of its product, to where the last one was that has been multiplied.
    constexpr int X_BUFFERS = N * BLOCKS > 256 ? 2 + DOUBLE : 4, AHEAD = X_BUFFERS - 1 - DOUBLE;
    // The shuffle tells the compiler that a warp's lanes agree: addresses stay in uniform registers.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int member = cluster_rank() % p.sharing, part = cluster_rank() / p.sharing;
    const int parts = cluster_size() / p.sharing;
    const int tiles = p.cols / 64, first = tiles * part / parts;
    const int steps = tiles * (part + 1) / parts - first;
    const int token0 = blockIdx.y * N, row0 = (blockIdx.z * p.sharing + member) * ROWS;

    // Shared memory: the barriers; x, from a multiple of 1024 on; the warps' rings; 16 bytes that may
    // be read but are not used. The sums take the place of x and the rings.
    const uint32_t base = shared_address(shared_memory());
    const uint32_t x_at = (base + 16 * X_BUFFERS + 1023) / 1024 * 1024 - base;
    const uint32_t full = base, free = base + 8 * X_BUFFERS;
    Ring<STAGES, KEPT> ring =
        make_ring<STAGES, KEPT>(p, x_at + X_BUFFERS * X_BYTES + warp * STAGES * p.capacity,
                          row0 / 16 + warp, first, steps);
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < X_BUFFERS; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(free + 8 * i, 4 * WARPGROUPS * p.sharing);
        }
        publish_barriers();
    }
    cluster_barrier();
    wait_for_previous();  // it may have written x; the weights were there before

    // Tile `step` of x: this block's share of it, in pieces that lie together, to all that share it.
    // Blocks of 64 tokens past the last one repeat it, and their sums are left out.
    const int last = (p.tokens - 1) / 64;
    const uint32_t share = X_BYTES / p.sharing, piece = min(share & (0u - share), uint32_t(PIECE));
    const uint16_t sharers = uint16_t(((1 << p.sharing) - 1) << (part * p.sharing));
    auto send_x = [&](int step) {
        const int buffer = step % X_BUFFERS, use = step / X_BUFFERS;
        if (use > 0) barrier_wait(free + 8 * buffer, (use - 1) % 2);
        if (lane != 0) return;
        barrier_expect(full + 8 * buffer, X_BYTES);
        for (uint32_t i = member * share; i < (member + 1) * share; i += piece) {
            int block = min(int(token0 / 64 + i / PIECE), last);
            const char* from = static_cast<const char*>(p.x) +
                               (int64_t(block) * tiles + first + step) * PIECE + i % PIECE;
            uint32_t to = base + x_at + buffer * X_BYTES + i;
            if (p.sharing == 1)
                copy_bulk(to, from, piece, full + 8 * buffer);
            else
                copy_to_blocks(to, from, piece, full + 8 * buffer, sharers);
        }
    };

    float sum[N / 64][32] = {};
    Tile tile;  // the next one to fetch
    auto multiply = [&](int step, const uint32_t(&a)[4][4]) {
        const int buffer = step % X_BUFFERS;
        barrier_wait(full + 8 * buffer, step / X_BUFFERS % 2);
        __syncwarp();
        multiply_tile<T, N>(sum, a, base + x_at + buffer * X_BYTES);
    };
    // Multiplies by tile `step`, whose weights are in `a`, and makes ready the next one in `a_next`,
    // which the products of the step before may still be reading.
    auto advance = [&](int step, uint32_t(&a)[4][4], uint32_t(&a_next)[4][4]) {
        multiply(step, a);
        if (warp == 0 && step + AHEAD < steps) send_x(step + AHEAD);
        __syncwarp();
        if (!KEPT) tile = next_tile(ring, step + 1, true);
        products_wait<DOUBLE>();
        keep_all(a_next);
        if (step >= DOUBLE && lane < p.sharing)
            barrier_arrive(free + 8 * ((step - DOUBLE) % X_BUFFERS), part * p.sharing + lane);
        __syncwarp();
        Tile later;
        if (KEPT) later = next_tile(ring, step + 2, false);
        fetch_half<0>(tile, a_next);
        fetch_half<1>(tile, a_next);
        if (KEPT) tile = later;
    };

    if (steps > 0) {
        uint32_t a[1 + DOUBLE][4][4] = {};
        if (warp == 0)
            for (int i = 0; i < min(AHEAD, steps); ++i) send_x(i);
        __syncwarp();
        tile = next_tile(ring, 0, !DOUBLE);
        fetch_half<0>(tile, a[0]);
        fetch_half<1>(tile, a[0]);
        if (KEPT) tile = next_tile(ring, 1, false);
        int step = 0;
        for (; step + 2 < steps; step += 2) {
            advance(step, a[0], a[DOUBLE]);
            advance(step + 1, a[DOUBLE], a[0]);
        }
        if (step + 1 < steps) {  // two endings: copied registers would make products wait
            advance(step, a[0], a[DOUBLE]);
            multiply(step + 1, a[DOUBLE]);
        } else {
            multiply(step, a[0]);
        }
        products_wait<0>();
        keep_all(a[0]);
        keep_all(a[DOUBLE]);
    }
    wait<0>();
    start_next();
    add_and_write<T, WARPGROUPS, N>(p, sum, x_at, token0, row0, part, parts, member, p.sharing);
}
