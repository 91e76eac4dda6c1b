// Records (see records.cuh) back to a dense matrix, for products of so many tokens that the time to
// expand is small beside them; and what int8 products by cuBLAS need after them.
//
// Every warp has a run of tiles, as long as every other's, and a ring of STAGES records in shared
// memory. Floats come out bit for bit, int8 values times their scale and rounded once, or as they are.
#include "records.cuh"

enum Source { VALUES, TWO_FOUR, INT8 };

struct Expansion {
    const char* records;
    const int* offsets;  // not for TWO_FOUR
    const float* scale;  // [rows, groups] of int8 values
    void* dense;         // T [rows, cols], or int8 where T is int8_t
    int rows, cols, tiles;  // of all records
    int capacity, groups, group_size;
};

template <class T>
struct BytesOf {
    static constexpr int value = 2;
};
template <>
struct BytesOf<int8_t> {
    static constexpr int value = 1;
};

// Four int8 weights times their scale, as floats of type T.
template <class T>
DEVICE uint2 scaled(uint32_t bytes, float scale) {
    float w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        w[j] = (float_of_bits(permute(bytes ^ 0x80808080u, 0x4B000000u, 0x7540u | j)) - 8388736.0f) *
               scale;
    return make_uint2(pack2(T(), w[0], w[1]), pack2(T(), w[2], w[3]));
}

// Where two kept values of four go, by their four bits of metadata.
DEVICE uint2 placed(uint32_t pair, uint32_t nibble) {
    uint32_t low = nibble & 3, high = nibble >> 2 & 3;
    uint32_t words[2] = {0, 0};
    words[0] |= low < 2 ? (pair & 0xFFFFu) << (16 * low) : 0;
    words[1] |= low < 2 ? 0 : (pair & 0xFFFFu) << (16 * (low - 2));
    words[0] |= high < 2 ? (pair >> 16) << (16 * high) : 0;
    words[1] |= high < 2 ? 0 : (pair >> 16) << (16 * (high - 2));
    return make_uint2(words[0], words[1]);
}

// -0.0, which fills a four of which fewer than two are kept, as +0.0.
DEVICE uint32_t without_minus_zero(uint32_t pair) {
    if ((pair & 0xFFFFu) == 0x8000u) pair &= 0xFFFF0000u;
    if (pair >> 16 == 0x8000u) pair &= 0xFFFFu;
    return pair;
}

template <class T, int SOURCE, int WARPS, int STAGES>
KERNEL(WARPS * 32, 2) expand(const Expansion p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int across = p.cols / 64, capacity = SOURCE == TWO_FOUR ? TWO_FOUR_BYTES : p.capacity;
    const uint32_t ring = 64 + warp * STAGES * capacity;
    const uint32_t target = shared_address(shared_memory()) + ring + lane * 16;
    const int64_t warps = int64_t(gridDim.x) * WARPS, own = int64_t(blockIdx.x) * WARPS + warp;
    const int first = int(own * p.tiles / warps), last = int((own + 1) * p.tiles / warps);

    start_next();
    if (SOURCE == INT8) {
        make_selectors(threadIdx.x);
        __syncthreads();
    }
    auto copy = [&](int tile, int stage) {
        if (tile < last) {
            int64_t begin = SOURCE == TWO_FOUR ? int64_t(tile) * TWO_FOUR_BYTES
                                               : int64_t(__ldg(p.offsets + tile)) * 16;
            int size = SOURCE == TWO_FOUR ? TWO_FOUR_BYTES
                                          : int(int64_t(__ldg(p.offsets + tile + 1)) * 16 - begin);
            const char* from = p.records + begin + lane * 16;
            for (int i = 0; i + lane * 16 < size; i += 512)
                copy16(target + stage * capacity + i, from + i);
        }
        commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copy(first + i, i);
    wait_for_previous();  // it may still read what is about to be written

    int stage = 0;
    for (int tile = first; tile < last; ++tile) {
        wait<STAGES - 2>();
        __syncwarp();
        copy(tile + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
        const uint32_t record = ring + stage * capacity;
        const int row = tile / across * 16 + g, column = tile % across * 64 + 16 * t;
        char* to[2];
#pragma unroll
        for (int h = 0; h < 2; ++h)
            to[h] = static_cast<char*>(p.dense) +
                    (int64_t(row + 8 * h) * p.cols + column) * BytesOf<T>::value;
        if constexpr (SOURCE == VALUES) {
            Tile decoded = locate(record, lane);
            uint32_t a[4][4];
            fetch4<0>(decoded, a[0]);
            fetch4<1>(decoded, a[1]);
            fetch4<2>(decoded, a[2]);
            fetch4<3>(decoded, a[3]);
#pragma unroll
            for (int h = 0; h < 2; ++h)
                if (row + 8 * h < p.rows) {
                    uint4* words = reinterpret_cast<uint4*>(to[h]);
                    words[0] = make_uint4(a[0][h], a[0][2 + h], a[1][h], a[1][2 + h]);
                    words[1] = make_uint4(a[2][h], a[2][2 + h], a[3][h], a[3][2 + h]);
                }
        } else if constexpr (SOURCE == INT8) {
            ByteTile decoded = locate_bytes(record, lane);
            uint32_t bytes[2][4];
            fetch_bytes<0>(decoded, bytes[0][0], bytes[0][1]);
            fetch_bytes<1>(decoded, bytes[0][2], bytes[0][3]);
            fetch_bytes<2>(decoded, bytes[1][0], bytes[1][1]);
            fetch_bytes<3>(decoded, bytes[1][2], bytes[1][3]);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (row + 8 * h >= p.rows) continue;
                uint4* words = reinterpret_cast<uint4*>(to[h]);
                if constexpr (BytesOf<T>::value == 1) {
                    words[0] = make_uint4(bytes[h][0], bytes[h][1], bytes[h][2], bytes[h][3]);
                } else {
                    int group = column / p.group_size;
                    bool there = group < p.groups;  // not in the columns that fill the last tile
                    float scale =
                        there ? __ldg(p.scale + int64_t(row + 8 * h) * p.groups + group) : 0.0f;
                    uint2 w[4];
#pragma unroll
                    for (int s = 0; s < 4; ++s) w[s] = scaled<T>(bytes[h][s], scale);
                    words[0] = make_uint4(w[0].x, w[0].y, w[1].x, w[1].y);
                    words[1] = make_uint4(w[2].x, w[2].y, w[3].x, w[3].y);
                }
            }
        } else {
            const char* words = shared_memory() + record;
            uint32_t meta = reinterpret_cast<const uint32_t*>(words)[lane];
            uint2 four[2][2][2];  // [j][u][h]: four q = 4 u + t of mma j, row g + 8 h
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint4 a = reinterpret_cast<const uint4*>(words + MASK_BYTES + 512 * j)[lane];
                uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int h = i % 2, u = i / 2;
                    uint32_t bits = __shfl_sync(~0u, meta, 4 * g + 2 * j + u);
                    uint2 f = placed(without_minus_zero(pairs[i]), bits >> (16 * h + 4 * t));
                    four[j][u][h] = j == 1 ? make_uint2(f.y, f.x) : f;
                }
            }
            // The lane and lane t ^ 2 have every other of 8 fours in a row. Each takes half of them,
            // that of mma t / 2, which are 32 bytes in a row.
            const int half = t / 2, place = 4 * (8 * (t % 2) + 4 * half);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint4 fours[2];
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    uint2 own = half ? four[1][u][h] : four[0][u][h];
                    uint2 sent = half ? four[0][u][h] : four[1][u][h], got;
                    got.x = __shfl_xor_sync(~0u, sent.x, 2);
                    got.y = __shfl_xor_sync(~0u, sent.y, 2);
                    fours[u] = half ? make_uint4(got.x, got.y, own.x, own.y)
                                    : make_uint4(own.x, own.y, got.x, got.y);
                }
                uint4* to_fours = reinterpret_cast<uint4*>(
                    static_cast<uint16_t*>(p.dense) + int64_t(row + 8 * h) * p.cols +
                    tile % across * 64 + place);
                if (row + 8 * h < p.rows) to_fours[0] = fours[0], to_fours[1] = fours[1];
            }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    wait<0>();
}

// y = sums x_scale scale^T + bias, of int32 sums [tokens, rows] as cuBLAS gives them.
struct Rescaling {
    const int* sums;
    const float* x_scale;  // [tokens]
    const float* scale;    // [rows]
    const void* bias;      // T [rows], or null
    void* y;               // T [tokens, rows]
    int rows;
};

template <class T>
KERNEL(256, 4) rescale(const Rescaling p) {
    int row = (blockIdx.y * 256 + threadIdx.x) * 2;
    if (row >= p.rows) return;
    int64_t place = int64_t(blockIdx.x) * p.rows + row;
    const uint16_t* bias = static_cast<const uint16_t*>(p.bias);
    float factor = p.x_scale[blockIdx.x], value[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // rows come in pairs: cuBLAS takes multiples of 8
        value[i] = float(p.sums[place + i]) * p.scale[row + i] * factor;
        if (bias != nullptr) value[i] += unpack(T(), bias[row + i]);
    }
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.y) + place) =
        pack2(T(), value[0], value[1]);
}
