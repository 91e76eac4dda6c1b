// A block of columns, visited from left to right: what a row loses is made up for by those to come.
//
// Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, Algorithm 1, the inner loop. U is the upper
// Cholesky factor of the inverse Hessian. For column j of a row, if it is pruned,
//
//     error = w[j] / U[j][j]        w[k] -= error * U[j][k] for k >= j
//
// and for N:M, whenever j begins a group, its kept columns are chosen from the weights as they are by
// then: the n with the largest (w[k] / U[k][k])^2, of equals the last ones; columns whose input never
// fires (`dead`) count 0. Rows do not know of each other: a warp takes a row, and holds columns
// lane + 32 i in registers. Errors go out, for the columns right of the block.
#include "device.cuh"

constexpr int WIDTH = 128, PARTS = WIDTH / 32;  // columns of a block, at most; of a lane
constexpr int ROWS = 16;                        // rows that a thread block has at a time
constexpr uint32_t ALL = 0xffffffff;

struct Compensate {
    float* weight;        // [rows, width], changed in place
    const float* factor;  // [width, width], the square of U on its diagonal, contiguous
    uint8_t* mask;        // bool [rows, width]; read, and for N:M written
    float* errors;        // [rows, width], contiguous; written
    const uint8_t* dead;  // bool [width], for N:M
    int64_t weight_stride, mask_stride;  // elements from row to row
    int32_t rows, width, n, m;           // m: 0 if the mask is given
};

// Row j of U as shared memory holds it: zeros left of the diagonal and past the width.
DEVICE void load_factor(const Compensate& p, float* factor) {
    for (int i = threadIdx.x; i < WIDTH * WIDTH; i += 32 * ROWS) {
        const int j = i / WIDTH, k = i % WIDTH;
        const bool there = j <= k && k < p.width;
        factor[i] = there ? __ldg(p.factor + j * p.width + k) : 0;
    }
}

// The keep-bits of the group that begins at column j; none of its columns lies left of part FIRST.
template <int FIRST>
DEVICE void choose(const Compensate& p, const float* factor, float* scores, const float (&w)[PARTS],
                   int j, uint32_t (&kept)[PARTS]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = FIRST; i < PARTS; ++i) {
        const int k = 32 * i + lane;
        if (k < j || k >= j + p.m) continue;
        const float scaled = w[i] / factor[WIDTH * k + k];
        scores[k] = p.dead[k] ? 0 : scaled * scaled;
    }
    __syncwarp();
#pragma unroll
    for (int i = FIRST; i < PARTS; ++i) {
        if (32 * i + 32 <= j || 32 * i >= j + p.m) continue;  // the same for all lanes
        const int k = 32 * i + lane;
        const bool member = j <= k && k < j + p.m;
        int higher = 0;
        if (member)
#pragma unroll 1
            for (int other = j; other < j + p.m; ++other) {
                if (other > k) higher += scores[other] >= scores[k];
                if (other < k) higher += scores[other] > scores[k];
            }
        kept[i] &= ~__ballot_sync(ALL, member);
        kept[i] |= __ballot_sync(ALL, member && higher < p.n);
    }
    __syncwarp();
}

// The 32 columns of part PART, and what they change right of them.
template <int PART>
DEVICE void visit(const Compensate& p, const float* factor, float* scores, float (&w)[PARTS],
                  float (&errors)[PARTS], uint32_t (&kept)[PARTS], int& group) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1  // the code is long enough: four parts, and all that they choose
    for (int l = 0; l < 32; ++l) {
        const int j = 32 * PART + l;
        if (j >= p.width) return;
        if (j == group) {
            choose<PART>(p, factor, scores, w, j, kept);
            group += p.m;
        }
        if (kept[PART] >> l & 1) continue;
        const float* u = factor + WIDTH * j;
        const float error = __shfl_sync(ALL, w[PART], l) / u[j];
        if (lane == l) errors[PART] = error;
        if (lane >= l) w[PART] -= error * u[32 * PART + lane];
#pragma unroll
        for (int i = PART + 1; i < PARTS; ++i) w[i] -= error * u[32 * i + lane];
    }
}

KERNEL(32 * ROWS, 2) compensate(const Compensate p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* factor = reinterpret_cast<float*>(shared_memory());
    float* scores = factor + WIDTH * WIDTH + WIDTH * warp;  // asked for with N:M only
    load_factor(p, factor);
    __syncthreads();

    for (int row = ROWS * blockIdx.x + warp; row < p.rows; row += ROWS * gridDim.x) {
        float* weight = p.weight + row * p.weight_stride;
        uint8_t* mask = p.mask + row * p.mask_stride;
        float w[PARTS], errors[PARTS] = {};
        uint32_t kept[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int k = 32 * i + lane;
            w[i] = k < p.width ? weight[k] : 0;
            kept[i] = __ballot_sync(ALL, k < p.width && mask[k]);
        }
        int group = p.m ? 0 : p.width;  // where the next one begins
        visit<0>(p, factor, scores, w, errors, kept, group);
        visit<1>(p, factor, scores, w, errors, kept, group);
        visit<2>(p, factor, scores, w, errors, kept, group);
        visit<3>(p, factor, scores, w, errors, kept, group);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
            const int k = 32 * i + lane;
            if (k >= p.width) continue;
            weight[k] = w[i];
            p.errors[int64_t(row) * p.width + k] = errors[i];
            if (p.m) mask[k] = kept[i] >> lane & 1;
        }
    }
}
