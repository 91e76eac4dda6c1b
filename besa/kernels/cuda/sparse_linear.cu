// y = x W^T + bias for few tokens, with W as records (see records.cuh).
//
// A thread block has R row blocks of 16 rows; its warps take the tiles of these rows in turn, each with
// a ring of STAGES steps in its shared memory that cp.async fills. A step is the R records of one tile
// of columns, multiplied by the same part of x. In the end the warps' sums are added in the order of
// the warps, so that the result has the same bits in every run. Where there are too few rows for all
// multiprocessors, the blocks of a cluster share the tiles (SPLIT, sm_90), and add their sums through
// each other's shared memory, in the order of the blocks.
//
// What decides the speed (measured on an H100, LOG.md): 32 warps a multiprocessor with 64 registers
// each, since the way from the mask to the product is some 1500 cycles long; and a grid that fills the
// GPU evenly. Which instance is best depends on the shape, so that it is measured (tuning.py).
#include "hopper.cuh"
#include "records.cuh"

// What is multiplied.
//   VALUES     16-bit floats T, unstructured
//   TWO_FOUR   16-bit floats T, 2 of 4
//   INT8       int8 by int8: x is quantized, by each block for itself
//   INT8_READY int8 by int8: x was quantized before, by `quantize`
//   INT8_FLOAT int8 by 16-bit floats T
enum Kind { VALUES, TWO_FOUR, INT8, INT8_READY, INT8_FLOAT };

struct Problem {
    const char* records;
    const int* offsets;    // not for TWO_FOUR
    const void* x;         // T [tokens, cols]; for INT8_READY int8
    const float* x_scale;  // [tokens], for INT8_READY
    const float* scale;    // [rows, groups] of int8 values
    const void* bias;      // T [rows], or null
    void* y;               // T [tokens, rows]
    int rows, cols, tokens;
    int capacity;   // bytes of the largest record
    int groups;     // scales of a row
    int group_log;  // log2 of the tiles that share a scale
};

template <class T>
DEVICE float at(const void* numbers, int64_t index) {
    return unpack(T(), reinterpret_cast<const uint16_t*>(numbers)[index]);
}

template <class T>
DEVICE void put(void* numbers, int64_t index, float value) {
    reinterpret_cast<uint16_t*>(numbers)[index] = uint16_t(pack2(T(), value, 0.0f));
}

// ---------------------------------------------------------------- quantization of x

// The bits of the largest of |x| in 8 numbers. NaN has larger ones than infinity.
DEVICE uint32_t most_of(uint4 v, uint32_t most) {
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        most = max(most, words[i] & 0x7FFFu);
        most = max(most, words[i] >> 16 & 0x7FFFu);
    }
    return most;
}

DEVICE uint32_t most_of_warp(uint32_t most) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
        most = max(most, __shfl_xor_sync(~0u, most, distance));
    return most;
}

// 127 over the largest; 0, so that all becomes 0, if that is 0, infinite or NaN.
DEVICE float inverse_of(float most) { return most > 0 && most < 3.4e38f ? 127.0f / most : 0.0f; }

// The scale of a token; NaN, so that all of its results are, if not all of it is finite.
DEVICE float scale_of(float most) {
    return most < 3.4e38f ? most / 127.0f : float_of_bits(0x7FC00000u);
}

template <class T>
DEVICE uint2 quantize8(uint4 v, float inverse) {
    uint32_t words[4] = {v.x, v.y, v.z, v.w}, bytes[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float f = unpack(T(), words[i / 2] >> (16 * (i % 2)) & 0xFFFFu);
        uint32_t whole = inverse == 0.0f ? 0 : uint32_t(to_int(f * inverse)) & 0xFFu;
        bytes[i / 4] |= whole << (8 * (i % 4));
    }
    return make_uint2(bytes[0], bytes[1]);
}

// x as int8 [tokens, cols] and scales [tokens]; a block has a token.
struct Quantization {
    const void* x;
    int8_t* x8;
    float* x_scale;
    int cols;
};

template <class T>
KERNEL(256, 4) quantize(const Quantization p) {
    start_next();
    wait_for_previous();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pieces = p.cols / 8;
    const uint4* from = reinterpret_cast<const uint4*>(p.x) + int64_t(blockIdx.x) * pieces;
    uint2* to = reinterpret_cast<uint2*>(p.x8) + int64_t(blockIdx.x) * pieces;
    uint32_t most = 0;
    for (int i = threadIdx.x; i < pieces; i += 256) most = most_of(from[i], most);
    most = most_of_warp(most);
    uint32_t* all = reinterpret_cast<uint32_t*>(shared_memory());
    if (lane == 0) all[warp] = most;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < 8; ++w) most = max(most, all[w]);
    float largest = unpack(T(), most), inverse = inverse_of(largest);
    for (int i = threadIdx.x; i < pieces; i += 256) to[i] = quantize8<T>(from[i], inverse);
    if (threadIdx.x == 0) p.x_scale[blockIdx.x] = scale_of(largest);
}

// The same within a block, to its shared memory: x8 at `x8_at`, scales at `scales_at`.
template <class T, int WARPS, int TOKENS>
DEVICE void quantize_here(const Problem& p, uint32_t x8_at, uint32_t scales_at) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pieces = p.cols / 8;
    const uint4* x = reinterpret_cast<const uint4*>(p.x);
    uint32_t* all = reinterpret_cast<uint32_t*>(shared_memory() + scales_at) + TOKENS;
    float* scales = reinterpret_cast<float*>(shared_memory() + scales_at);
    for (int token = 0; token < p.tokens; ++token) {
        uint32_t most = 0;
        for (int i = threadIdx.x; i < pieces; i += WARPS * 32)
            most = most_of(x[int64_t(token) * pieces + i], most);
        most = most_of_warp(most);
        if (lane == 0) all[token * WARPS + warp] = most;
    }
    __syncthreads();
    for (int token = 0; token < p.tokens; ++token) {
        uint32_t most = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = max(most, all[token * WARPS + w]);
        float largest = unpack(T(), most), inverse = inverse_of(largest);
        uint2* to = reinterpret_cast<uint2*>(shared_memory() + x8_at) + int64_t(token) * pieces;
        for (int i = threadIdx.x; i < pieces; i += WARPS * 32)
            to[i] = quantize8<T>(x[int64_t(token) * pieces + i], inverse);
        if (threadIdx.x == 0) scales[token] = scale_of(largest);
    }
    __syncthreads();
}

// ---------------------------------------------------------------- products

template <bool CONDITION, class A, class B>
struct If {
    typedef A type;
};
template <class A, class B>
struct If<false, A, B> {
    typedef B type;
};

DEVICE void locate(uint32_t record, int lane, Tile& tile) { tile = locate(record, lane); }
DEVICE void locate(uint32_t record, int lane, ByteTile& tile) { tile = locate_bytes(record, lane); }

// One lane's B registers for a tile: its columns 16 t to 16 t + 15 as they lie in memory; with 2 of 4
// kept, the even words are its own and the odd ones its neighbour's.
template <int KIND, int WORDS>
DEVICE void load_x(const char* from, bool live, int t, uint32_t (&b)[WORDS]) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (live) v = *reinterpret_cast<const uint4*>(from + 16 * i);
        b[4 * i] = v.x, b[4 * i + 1] = v.y, b[4 * i + 2] = v.z, b[4 * i + 3] = v.w;
    }
    if constexpr (KIND == TWO_FOUR) {
        uint32_t own[4], other[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            own[i] = b[2 * i];
            other[i] = __shfl_xor_sync(~0u, b[2 * i + 1], 1);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            b[i] = t % 2 ? other[i] : own[i];
            b[4 + i] = t % 2 ? own[i] : other[i];
        }
    }
}

// A tile's I-th product of 16 columns.
template <class T, int I, int NT>
DEVICE void multiply_16(const uint32_t (&a)[4], const uint32_t (&b)[NT][8], float (&sum)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
        mma(T(), sum[n], a[0], a[1], a[2], a[3], b[n][2 * I], b[n][2 * I + 1]);
}

template <class T, int NT>
DEVICE void multiply_tile(const Tile& tile, const uint32_t (&b)[NT][8], float (&sum)[NT][4]) {
    uint32_t a[4];
    fetch4<0>(tile, a);
    multiply_16<T, 0>(a, b, sum);
    fetch4<1>(tile, a);
    multiply_16<T, 1>(a, b, sum);
    fetch4<2>(tile, a);
    multiply_16<T, 2>(a, b, sum);
    fetch4<3>(tile, a);
    multiply_16<T, 3>(a, b, sum);
}

// int8 by int8.
template <class T, int NT>
DEVICE void multiply_tile(const ByteTile& tile, const uint32_t (&b)[NT][4], int (&sum)[NT][4]) {
    uint32_t a[8];
    fetch_bytes<0>(tile, a[0], a[2]);
    fetch_bytes<2>(tile, a[1], a[3]);
    fetch_bytes<1>(tile, a[4], a[6]);
    fetch_bytes<3>(tile, a[5], a[7]);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        mma(sum[n], a[0], a[1], a[2], a[3], b[n][0], b[n][1]);
        mma(sum[n], a[4], a[5], a[6], a[7], b[n][2], b[n][3]);
    }
}

// int8 by floats.
template <class T, int NT>
DEVICE void multiply_tile(const ByteTile& tile, const uint32_t (&b)[NT][8], float (&sum)[NT][4]) {
    uint32_t bytes[4], a[4];
    fetch_bytes<0>(tile, bytes[0], bytes[2]);
    fetch_bytes<2>(tile, bytes[1], bytes[3]);
    widen<T>(bytes[0], a[0], a[2]), widen<T>(bytes[1], a[1], a[3]);
    multiply_16<T, 0>(a, b, sum);
    widen<T>(bytes[2], a[0], a[2]), widen<T>(bytes[3], a[1], a[3]);
    multiply_16<T, 1>(a, b, sum);
    fetch_bytes<1>(tile, bytes[0], bytes[2]);
    fetch_bytes<3>(tile, bytes[1], bytes[3]);
    widen<T>(bytes[0], a[0], a[2]), widen<T>(bytes[1], a[1], a[3]);
    multiply_16<T, 2>(a, b, sum);
    widen<T>(bytes[2], a[0], a[2]), widen<T>(bytes[3], a[1], a[3]);
    multiply_16<T, 3>(a, b, sum);
}

template <class T, int NT>
DEVICE void multiply_two_four(const char* record, int lane, const uint32_t (&b)[NT][8],
                              float (&sum)[NT][4]) {
    uint32_t meta = reinterpret_cast<const uint32_t*>(record)[lane];
    uint4 first = reinterpret_cast<const uint4*>(record + MASK_BYTES)[lane];
    uint4 second = reinterpret_cast<const uint4*>(record + MASK_BYTES + 512)[lane];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        mma_sparse<0>(T(), sum[n], first, b[n][0], b[n][1], b[n][2], b[n][3], meta);
        mma_sparse<1>(T(), sum[n], second, b[n][4], b[n][5], b[n][6], b[n][7], meta);
    }
}

// T: of x, y and the bias. GROUP: 0 for floats and for int8 with a scale a row; 64 for a scale every
// 64 columns or a multiple of them; 32. NT: groups of 8 tokens, as many as there are. WARPS: of a
// block, MIN_BLOCKS of which shall fit a multiprocessor. PIECES: of 512 bytes in a record, at most.
// The grid is (blocks of a cluster, groups of R row blocks).
template <class T, int KIND, int GROUP, int R, int NT, int WARPS, int STAGES, int PIECES,
          int MIN_BLOCKS, bool SPLIT>
KERNEL(WARPS * 32, MIN_BLOCKS) multiply(const Problem p) {
    constexpr bool BYTES = KIND >= INT8, X_BYTES = KIND == INT8 || KIND == INT8_READY;
    typedef typename If<X_BYTES, int, float>::type Sum;
    typedef typename If<BYTES, ByteTile, Tile>::type Located;
    constexpr int WORDS = X_BYTES ? 4 : 8, X_SIZE = X_BYTES ? 1 : 2, PART = 128 * R * NT;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int rank = SPLIT ? blockIdx.x : 0, ranks = SPLIT ? gridDim.x : 1;
    const int first_row = blockIdx.y * 16 * R, stride = WARPS * ranks;
    const int first = rank * WARPS + warp, tiles = p.cols / 64;  // of the warp's tiles
    const int steps = (tiles - first + stride - 1) / stride;
    // Shared memory: 64 bytes of selectors, the rings, 16 bytes that may be read but not used. The
    // warps' sums take their place. Then x as int8 with its scales.
    const int capacity = KIND == TWO_FOUR ? TWO_FOUR_BYTES : p.capacity;
    const uint32_t ring = 64 + warp * STAGES * R * capacity;
    const uint32_t target = shared_address(shared_memory()) + ring + lane * 16;
    const uint32_t x8_at = max(80 + WARPS * STAGES * R * capacity, WARPS * PART * 4);
    const uint32_t scales_at = x8_at + p.tokens * p.cols;

    start_next();
    if (BYTES) make_selectors(threadIdx.x);

    int begin[R], end[R];  // of the records of this lane's step among the next 32
    auto look_up = [&](int step) {
        int tile = first + (step + lane) * stride;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int* from = p.offsets + int64_t(blockIdx.y * R + r) * tiles + tile;
            begin[r] = tile < tiles ? __ldg(from) : 0;
            end[r] = tile < tiles ? __ldg(from + 1) : 0;
        }
    };
    auto copy = [&](int step, int stage) {
        uint32_t to = target + stage * R * capacity;
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (KIND == TWO_FOUR) {
                int64_t tile = int64_t(blockIdx.y * R + r) * tiles + first + step * stride;
                const char* from = p.records + tile * TWO_FOUR_BYTES + lane * 16;
#pragma unroll
                for (int i = 0; i < 3; ++i)
                    if (step < steps && (i < 2 || lane < 8))
                        copy16(to + r * capacity + 512 * i, from + 512 * i);
            } else {  // no bytes past the last step
                int unit = __shfl_sync(~0u, begin[r], step % 32);
                int size = __shfl_sync(~0u, end[r], step % 32) - unit - lane;
                const char* from = p.records + (int64_t(unit) + lane) * 16;
#pragma unroll
                for (int i = 0; i < PIECES; ++i)
                    if (32 * i < size) copy16(to + r * capacity + 512 * i, from + 512 * i);
            }
        }
    };

    if (KIND != TWO_FOUR) look_up(0);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        copy(i, i);
        commit();
    }
    wait_for_previous();  // it may have written x; the weights were there before
    if (KIND == INT8)
        quantize_here<T, WARPS, 8 * NT>(p, x8_at, scales_at);
    else if (BYTES)
        __syncthreads();  // for the selectors

    float total[R][NT][4] = {};
    Sum sum[R][NT][4] = {};
    // Token 8 n + g, of which this lane has columns 16 t to 16 t + 15 of each tile.
    const char* x = KIND == INT8 ? shared_memory() + x8_at : static_cast<const char*>(p.x);
    x += (int64_t(g) * p.cols + 64 * first + 16 * t) * X_SIZE;
    int stage = 0;
    for (int step = 0; step < steps; ++step) {
        uint32_t b[NT][WORDS];
#pragma unroll
        for (int n = 0; n < NT; ++n)
            load_x<KIND>(x + int64_t(8 * n) * p.cols * X_SIZE, 8 * n + g < p.tokens, t, b[n]);
        x += 64 * X_SIZE * stride;
        wait<STAGES - 2>();
        __syncwarp();
        int next = step + STAGES - 1;
        if (KIND != TWO_FOUR && next % 32 == 0) look_up(next);
        copy(next, stage == 0 ? STAGES - 1 : stage - 1);
        commit();
        const uint32_t record = ring + stage * R * capacity;
        if constexpr (KIND == TWO_FOUR) {
#pragma unroll
            for (int r = 0; r < R; ++r)
                multiply_two_four<T>(shared_memory() + record + r * capacity, lane, b, sum[r]);
        } else {
            Located tile[R];
#pragma unroll
            for (int r = 0; r < R; ++r) locate(record + r * capacity, lane, tile[r]);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                if constexpr (GROUP == 0) {
                    multiply_tile<T>(tile[r], b, sum[r]);
                } else {  // every tile, or each half of one, has a scale of its own
                    const int place = first + step * stride;
#pragma unroll
                    for (int half = 0; half < (GROUP == 32 ? 2 : 1); ++half) {  // lanes t < 2 have
                        // the columns of the first group of 32, the others those of the second
                        Sum part[NT][4] = {};
                        uint32_t own[NT][WORDS];
#pragma unroll
                        for (int n = 0; n < NT; ++n)
#pragma unroll
                            for (int i = 0; i < WORDS; ++i)
                                own[n][i] = GROUP == 64 || t / 2 == half ? b[n][i] : 0;
                        multiply_tile<T>(tile[r], own, part);
                        int group = GROUP == 32 ? 2 * place + half : place >> p.group_log;
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            int row = first_row + 16 * r + g + 8 * h;
                            bool there = row < p.rows && group < p.groups;
                            float scale =
                                there ? __ldg(p.scale + int64_t(row) * p.groups + group) : 0.0f;
#pragma unroll
                            for (int n = 0; n < NT; ++n) {
                                total[r][n][2 * h] += float(part[n][2 * h]) * scale;
                                total[r][n][2 * h + 1] += float(part[n][2 * h + 1]) * scale;
                            }
                        }
                    }
                }
            }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    wait<0>();

    __syncthreads();  // the rings are done with
    float* sums = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = 16 * r + g + 8 * (i / 2), token = 8 * n + 2 * t + i % 2;
                sums[warp * PART + token * 16 * R + row] =
                    GROUP ? total[r][n][i] : float(sum[r][n][i]);
            }
    __syncthreads();
    const float* x_scale = KIND == INT8
                               ? reinterpret_cast<const float*>(shared_memory() + scales_at)
                               : p.x_scale;
    auto finish = [&](int i, float value) {  // sum i of the block's: token by token, row by row
        int token = i / (16 * R), row = first_row + i % (16 * R);
        if (row >= p.rows) return;
        if (BYTES && GROUP == 0) value *= p.scale[row];
        if (X_BYTES) value *= x_scale[token];
        if (p.bias != nullptr) value += at<T>(p.bias, row);
        put<T>(p.y, int64_t(token) * p.rows + row, value);
    };
    const int used = min(p.tokens, 8 * NT) * 16 * R;
    for (int i = threadIdx.x; i < used; i += WARPS * 32) {
        float value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) value += sums[w * PART + i];
        if (SPLIT)
            sums[i] = value;
        else
            finish(i, value);
    }
    if constexpr (SPLIT) {
        cluster_barrier();
        for (int i = 4 * (rank + threadIdx.x * ranks); i < used; i += 4 * WARPS * 32 * ranks) {
            float4 value = make_float4(0, 0, 0, 0);
            for (int r = 0; r < ranks; ++r) {
                float4 part = load_of_block(shared_address(sums + i), r);
                value.x += part.x, value.y += part.y, value.z += part.z, value.w += part.w;
            }
            finish(i, value.x), finish(i + 1, value.y);
            finish(i + 2, value.z), finish(i + 3, value.w);
        }
        cluster_barrier_after_reading();  // the others may still need this block's memory
    }
}
