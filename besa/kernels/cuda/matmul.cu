// y = x W^T + bias for some 33 to 512 tokens, with W as records (see records.cuh); sm_90a.
//
// A thread block has WARPGROUPS * 64 rows of W and N tokens. Each of its warps decodes the records of
// one row block into the A registers of wgmma, which takes A from registers: four warps, a warpgroup,
// multiply 64 rows together. What they multiply by, 64 columns of N tokens, lies once in the block's
// shared memory.
//
// The way of a tile from its mask to its product is some 1300 cycles long, most of them waiting, while
// the work is 100 passes of shared memory: it takes 16 to 24 warps of a multiprocessor to hide it. So
// registers decide. A tile has one set of A registers: while the product reads them, the warp locates
// the next tile's values, and fetches them when it has ended. (With two sets, 8 warps took 1700 to 1950
// cycles for a step, as many for 64 tokens as for 128, and 16 warps 2200; measured on an H100.)
//
// W has too few rows to fill the GPU, so the blocks of a cluster share the columns, and add their sums
// in the end, each those of some tokens, reading the others' shared memory in the order of the blocks:
// no counters, no workspace, and the same bits in every run.
//
// The columns of a tile are multiplied in the order in which the A registers have them: k' =
// 16 i + 8 h + 2 t + j of mma i is column 16 t + 4 i + 2 h + j. So x is stored in this order.
//
// A launch has the grid (cluster, tokens / N, rows / (64 WARPGROUPS)), rounded up; matmul.py counts.
#include "matmul.cuh"

constexpr int X_BUFFERS = 2;

// 16 bytes of one token, columns 8 c to 8 c + 7 of a tile: in four words, pair m of columns to chunk
// 4 (c % 2) + m, word c / 2. `to` is `place_in_row` of the row, `more` a multiple of 1024.
DEVICE void store_x(uint32_t to, uint32_t more, uint4 v) {
    char* shared = shared_memory() + more;
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
    constexpr int PARTS = CHUNKS > 2 ? 2 : 1, PART = CHUNKS / PARTS;  // loaded one after the other
    constexpr bool SUMMED = WARPGROUPS * BLOCKS < 6;  // if there are registers for it
    // The shuffle tells the compiler that a warp's lanes agree: addresses stay in uniform registers.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int rank = cluster_rank(), ranks = cluster_size();
    const int tiles = p.cols / 64, first = tiles * rank / ranks;
    const int steps = tiles * (rank + 1) / ranks - first;
    const int token0 = blockIdx.y * N, row0 = blockIdx.z * ROWS;

    // Shared memory: x, from a multiple of 1024 on; the warps' rings; 16 bytes that may be read but
    // are not used. The sums take their place.
    const uint32_t x_at = (0u - shared_address(shared_memory())) % 1024;
    const uint32_t x_address = shared_address(shared_memory()) + x_at;
    Ring<STAGES, 0> ring =
        make_ring<STAGES, 0>(p, x_at + X_BUFFERS * X_BYTES + warp * STAGES * p.capacity,
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
            store_x(x_to, buffer * X_BYTES + (part * PART + i) * (THREADS / 8) * ROW_BYTES, loaded[i]);
    };

    float sum[N / 64][32] = {};
    if (steps > 0) {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            load_part(0, part);
            store_part(0, part);
        }
        publish_to_products();
        uint32_t a[4][4];
        Tile tile = next_tile(ring, 0, SUMMED);
        fetch_half<0>(tile, a);
        fetch_half<1>(tile, a);
        for (int step = 0, buffer = 0;; ++step, buffer ^= 1) {
            const bool last = step + 1 == steps;
            if (!last) load_part(step + 1, 0);
            __syncthreads();  // x is there, and nobody needs that of the step before
            multiply_tile<T, N>(sum, a, x_address + buffer * X_BYTES);
            if (last) break;
            tile = next_tile(ring, step + 1, SUMMED);
            products_wait<0>();
            keep_all(a);
            fetch_half<0>(tile, a);
            store_part(buffer ^ 1, 0);
            if (PARTS == 2) load_part(step + 1, 1);
            fetch_half<1>(tile, a);
            if (PARTS == 2) store_part(buffer ^ 1, 1);
            publish_to_products();
        }
        products_wait<0>();
        keep_all(a);
    }
    wait<0>();
    start_next();
    add_and_write<T, WARPGROUPS, N>(p, sum, 0, token0, row0, rank, ranks, 0, 1);
}
