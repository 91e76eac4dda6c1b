// y = x W^T + bias for some 33 to 256 tokens, with W as records (see records.cuh); sm_90a.
//
// A thread block has WARPGROUPS * 64 rows of W and N tokens. Each of its warps decodes the records of
// one row block into the A registers of wgmma, which takes A from registers: four warps, a warpgroup,
// multiply 64 rows together. What they multiply by, 64 columns of N tokens, lies once in the block's
// shared memory. wgmma works on its own, so that a warp decodes tile k + 1 while tile k is multiplied.
//
// Decoding a tile costs a multiprocessor some 80 cycles, however many tokens there are, and multiplying
// it N / 2: decode it once for as many tokens as fit the registers. W has too few rows to fill the GPU,
// so the blocks of a cluster share the columns, and add their sums in the end, each those of some
// tokens, reading the others' shared memory in the order of the blocks: no counters, no workspace, and
// the same bits in every run.
//
// The columns of a tile are multiplied in the order in which the A registers have them: k' =
// 16 i + 8 h + 2 t + j of mma i is column 16 t + 4 i + 2 h + j. So x is stored in this order.
//
// A launch has the grid (cluster, tokens / N, rows / (64 WARPGROUPS)), rounded up; matmul.py counts.
#include "matmul.cuh"

struct Problem {
    const char* records;
    const int* offsets;
    const void* x;     // T [tokens, cols], 16-byte aligned, cols a multiple of 64
    const void* bias;  // T [rows], or null
    void* y;           // T [tokens, rows], 8-byte aligned
    int rows, cols, tokens;
    int capacity;  // bytes of the largest record
    int early;     // whether the next kernel may begin as soon as all blocks have, not when they end
};

constexpr int X_BUFFERS = 3;

// 16 bytes of one token, columns 8 c to 8 c + 7 of a tile: in four words, pair m of columns to chunk
// 4 (c % 2) + m, word c / 2. `to` is `place_in_row` of the row.
DEVICE void store_x(uint32_t to, uint4 v) {
    char* shared = shared_memory();
    *reinterpret_cast<uint32_t*>(shared + to) = v.x;
    *reinterpret_cast<uint32_t*>(shared + (to ^ 16)) = v.y;
    *reinterpret_cast<uint32_t*>(shared + (to ^ 32)) = v.z;
    *reinterpret_cast<uint32_t*>(shared + (to ^ 48)) = v.w;
}

// Where pair 0 goes, in bytes of the row; chunks are swizzled as `swizzled_rows` wants it.
DEVICE uint32_t place_in_row(int token, int c) {
    return 16 * (4 * (c % 2) ^ token % 8) + 4 * (c / 2);
}

// BLOCKS: that shall fit a multiprocessor; STAGES: records of a warp that are under way or in use.
template <class T, int WARPGROUPS, int N, int STAGES, int BLOCKS>
KERNEL(WARPGROUPS * 128, BLOCKS) matmul(const Problem p) {
    constexpr int THREADS = WARPGROUPS * 128, ROWS = WARPGROUPS * 64;
    constexpr int X_BYTES = N * ROW_BYTES, CHUNKS = N * 8 / THREADS;  // of 16 bytes of x a thread
    constexpr int PARTS = CHUNKS > 4 ? 2 : 1, PART = CHUNKS / PARTS;  // loaded one after the other
    constexpr int KEPT = WARPGROUPS * BLOCKS <= 2 && N < 256;  // if there are registers for it
    const int warp = threadIdx.x / 32;
    const int rank = cluster_rank(), ranks = cluster_size();
    const int tiles = p.cols / 64, first = tiles * rank / ranks;
    const int steps = tiles * (rank + 1) / ranks - first;
    const int token0 = blockIdx.y * N, row0 = blockIdx.z * ROWS;

    if (p.early) start_next();
    // Shared memory: x, from a multiple of 1024 on; the warps' rings; 16 bytes that may be read but
    // are not used. The sums take their place.
    const uint32_t x_at = (0u - shared_address(shared_memory())) % 1024;
    const uint32_t x_address = shared_address(shared_memory()) + x_at;
    Ring<STAGES, KEPT> ring =
        make_ring<STAGES, KEPT>(p, x_at + X_BUFFERS * X_BYTES + warp * STAGES * p.capacity,
                          row0 / 16 + warp, first, steps);
    wait_for_previous();  // it may have written x; the weights were there before

    // Chunk i of this thread is 16 bytes of token (i * THREADS + threadIdx.x) / 8; tokens past the last
    // one repeat it, and their sums are left out.
    const char* x = static_cast<const char*>(p.x) + (int64_t(token0) * p.cols + first * 64) * 2;
    uint32_t x_from[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        int token = min(int(i * THREADS + threadIdx.x) / 8, p.tokens - 1 - token0);
        x_from[i] = (uint32_t(token) * p.cols + threadIdx.x % 8 * 8) * 2;
    }
    const uint32_t x_to = x_at + threadIdx.x / 8 * ROW_BYTES +
                          place_in_row(threadIdx.x / 8, threadIdx.x % 8);
    uint4 loaded[PART];
    auto load_part = [&](int step, int part) {
#pragma unroll
        for (int i = 0; i < PART; ++i)
            loaded[i] = *reinterpret_cast<const uint4*>(x + int64_t(step) * ROW_BYTES +
                                                        x_from[part * PART + i]);
    };
    auto store_part = [&](int buffer, int part) {
#pragma unroll
        for (int i = 0; i < PART; ++i)
            store_x(x_to + buffer * X_BYTES + (part * PART + i) * (THREADS / 8) * ROW_BYTES, loaded[i]);
    };

    float sum[N / 64][32] = {};
    int buffer = 0;
    Tile tile;  // the next one to fetch
    auto multiply = [&](const uint32_t(&a)[4][4]) {
        __syncthreads();  // all of x is there
        multiply_tile<T, N>(sum, a, x_address + buffer * X_BYTES);
    };
    // Multiplies by tile `step`, whose weights are in `a`, and makes ready the next one in `a_next`,
    // which the products of the step before may still be reading.
    auto advance = [&](int step, uint32_t(&a)[4][4], uint32_t(&a_next)[4][4]) {
        load_part(step + 1, 0);
        multiply(a);
        buffer = buffer + 1 == X_BUFFERS ? 0 : buffer + 1;
        if (!KEPT) tile = next_tile(ring, step + 1);
        products_wait<1>();
        keep_all(a_next);
        Tile later;
        if (KEPT) later = next_tile(ring, step + 2);
        fetch_half<0>(tile, a_next);
        store_part(buffer, 0);
        if (PARTS == 2) load_part(step + 1, 1);
        fetch_half<1>(tile, a_next);
        if (PARTS == 2) store_part(buffer, 1);
        publish_to_products();
        if (KEPT) tile = later;
    };

    if (steps > 0) {
        uint32_t a[4][4], b[4][4] = {};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            load_part(0, part);
            store_part(0, part);
        }
        publish_to_products();
        tile = next_tile(ring, 0);
        fetch_half<0>(tile, a);
        fetch_half<1>(tile, a);
        if (KEPT) tile = next_tile(ring, 1);
        int step = 0;
        for (; step + 2 < steps; step += 2) {
            advance(step, a, b);
            advance(step + 1, b, a);
        }
        if (step + 1 < steps) {  // two endings: copied registers would make products wait
            advance(step, a, b);
            multiply(b);
        } else {
            multiply(a);
        }
        products_wait<0>();
        keep_all(a);
        keep_all(b);
    }
    wait<0>();
    start_next();
    add_and_write<T, WARPGROUPS, N>(p, sum, 0, token0, row0, rank, ranks, 0, 1);
}
