// Which N of every M neighbours have the highest scores: M is 2, 4 or 8; of equals, the last ones.
//
// Rows are whole numbers of groups, so that a matrix is one long row. A thread takes eight scores: 32
// bytes in, 8 out, and nothing twice.
#include "device.cuh"

constexpr int EIGHT = 8, THREADS = 256;

struct Choice {
    const float* scores;  // [count], at a multiple of 16 bytes
    uint8_t* mask;        // bool [count], at a multiple of 8 bytes
    int64_t count;        // a multiple of M
    int32_t n;
};

template <int M>
DEVICE void choose(const float (&scores)[EIGHT], int n, bool (&kept)[EIGHT]) {
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) {
        int higher = 0;
#pragma unroll
        for (int j = i / M * M; j < i / M * M + M; ++j) {
            if (j > i) higher += scores[j] >= scores[i];
            if (j < i) higher += scores[j] > scores[i];
        }
        kept[i] = higher < n;
    }
}

template <int M>
KERNEL(THREADS, 4) n_of_m(const Choice p) {
    const int64_t at = EIGHT * (int64_t(blockIdx.x) * THREADS + threadIdx.x);
    if (at >= p.count) return;
    float scores[EIGHT] = {};
    bool kept[EIGHT];
    if (at + EIGHT <= p.count) {
        const float4* pieces = reinterpret_cast<const float4*>(p.scores + at);
        const float4 low = __ldg(pieces), high = __ldg(pieces + 1);
        scores[0] = low.x, scores[1] = low.y, scores[2] = low.z, scores[3] = low.w;
        scores[4] = high.x, scores[5] = high.y, scores[6] = high.z, scores[7] = high.w;
        choose<M>(scores, p.n, kept);
        uint32_t words[2] = {};
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) words[i / 4] |= uint32_t(kept[i]) << 8 * (i % 4);
        *reinterpret_cast<uint2*>(p.mask + at) = make_uint2(words[0], words[1]);
    } else {
        const int rest = int(p.count - at);
#pragma unroll
        for (int i = 0; i < EIGHT; ++i)
            if (i < rest) scores[i] = p.scores[at + i];
        choose<M>(scores, p.n, kept);
#pragma unroll
        for (int i = 0; i < EIGHT; ++i)
            if (i < rest) p.mask[at + i] = kept[i];
    }
}
