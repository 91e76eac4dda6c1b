// Masks by bucket, and their gradient: what learning BESA's rates costs beyond the block itself.
//
//     mask_buckets  out[r][j] = weight[r][j] if bucket[r][j] >= first_kept[r], else 0
//     segment_sum   out[r][b] = sum of values[r][j] * weight[r][j] over the j with bucket[r][j] == b
//
// Both read each matrix once, so memory's bandwidth is their bound: 5 bytes a weight of 16 bits.
// VECTOR instances take eight neighbours at a time: columns are a multiple of eight, and matrices
// begin at a multiple of 16 bytes. The others take any matrix whose rows follow one another.
#include "device.cuh"

constexpr int EIGHT = 8;

// ---------------------------------------------------------------- numbers as they lie in memory

template <class T>
struct Stored {
    using Type = uint16_t;
};
template <>
struct Stored<float> {
    using Type = float;
};

template <class T>
DEVICE float number(T type, uint16_t bits) {
    return unpack(type, bits);
}
DEVICE float number(float, float f) { return f; }

// Eight neighbours, held as they came until they are needed.
template <class T>
struct Numbers {
    uint4 words;

    static Numbers load(const uint16_t* from) {
        return {__ldg(reinterpret_cast<const uint4*>(from))};
    }
    void widen(float (&to)[EIGHT]) const {
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
        for (int i = 0; i < 4; ++i) {
            to[2 * i] = unpack(T(), word[i]);
            to[2 * i + 1] = unpack(T(), word[i] >> 16);
        }
    }
};
template <>
struct Numbers<float> {
    float4 low, high;

    static Numbers load(const float* from) {
        const float4* pieces = reinterpret_cast<const float4*>(from);
        return {__ldg(pieces), __ldg(pieces + 1)};
    }
    void widen(float (&to)[EIGHT]) const {
        to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
        to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    }
};

struct Buckets {
    uint2 words;

    static Buckets load(const uint8_t* from) {
        return {__ldg(reinterpret_cast<const uint2*>(from))};
    }
    int at(int i) const { return (i < 4 ? words.x : words.y) >> 8 * (i % 4) & 255; }
};

// ---------------------------------------------------------------- sums by bucket

struct SegmentSum {
    const void* values;      // [rows, cols]
    const void* weight;      // [rows, cols], or null for ones
    const uint8_t* buckets;  // [rows, cols]
    float* out;              // [rows, n_buckets]
    int32_t cols, n_buckets;
};

// Eight neighbours of both matrices.
template <class T>
struct Terms {
    Numbers<T> values, weight;
    Buckets buckets;

    void load(const SegmentSum& p, int64_t at) {
        using Type = typename Stored<T>::Type;
        values = Numbers<T>::load(static_cast<const Type*>(p.values) + at);
        if (p.weight) weight = Numbers<T>::load(static_cast<const Type*>(p.weight) + at);
        buckets = Buckets::load(p.buckets + at);
    }
    void add_to(float* own, const SegmentSum& p) const {
        float terms[EIGHT], factors[EIGHT];
        values.widen(terms);
        if (p.weight) {
            weight.widen(factors);
            for (int i = 0; i < EIGHT; ++i) terms[i] *= factors[i];
        }
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) {
            const int bucket = buckets.at(i);
            own[32 * (bucket < p.n_buckets ? bucket : p.n_buckets)] += terms[i];
        }
    }
};

constexpr int SUM_WARPS = 2;

// One block sums one row. Every thread has a histogram of its own in shared memory, as
// [warp][bucket][lane], so that lanes never meet in a bank and no addition is atomic: the order of the
// additions, and so every bit of the sums, is the same in every run. Bucket n_buckets takes what is
// left out, and is not read: that costs less than a branch. A thread is two loads ahead of what it
// adds.
template <class T, bool VECTOR>
KERNEL(32 * SUM_WARPS, 8) segment_sum(const SegmentSum p) {
    constexpr int THREADS = 32 * SUM_WARPS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = p.n_buckets;
    const int64_t row = int64_t(blockIdx.x) * p.cols;
    float* all = reinterpret_cast<float*>(shared_memory());
    float* own = all + 32 * (n + 1) * warp + lane;

    for (int b = 0; b <= n; ++b) own[32 * b] = 0;
    if (VECTOR) {
        const int first = EIGHT * threadIdx.x, step = EIGHT * THREADS;
        Terms<T> next, after;
        if (first < p.cols) next.load(p, row + first);
        if (first + step < p.cols) after.load(p, row + first + step);
        for (int j = first; j < p.cols; j += step) {
            const Terms<T> now = next;
            next = after;
            if (j + 2 * step < p.cols) after.load(p, row + j + 2 * step);
            now.add_to(own, p);
        }
    } else {
        using Type = typename Stored<T>::Type;
        const Type* values = static_cast<const Type*>(p.values) + row;
        const Type* weight = static_cast<const Type*>(p.weight) + row;
        for (int j = threadIdx.x; j < p.cols; j += THREADS) {
            const int bucket = p.buckets[row + j];
            const float term = number(T(), values[j]) * (p.weight ? number(T(), weight[j]) : 1);
            own[32 * (bucket < n ? bucket : n)] += term;
        }
    }
    __syncthreads();

    // Each thread adds up a bucket, beginning at its own lane: again no two lanes in a bank.
    for (int b = threadIdx.x; b < n; b += THREADS) {
        float sum = 0;
        for (int w = 0; w < SUM_WARPS; ++w)
#pragma unroll
            for (int i = 0; i < 32; ++i) sum += all[32 * ((n + 1) * w + b) + (i + lane) % 32];
        p.out[int64_t(blockIdx.x) * n + b] = sum;
    }
}

// ---------------------------------------------------------------- masks

struct MaskBuckets {
    const void* weight;         // [rows, cols]
    const uint8_t* buckets;     // [rows, cols]
    const uint8_t* first_kept;  // [rows]
    void* out;                  // [rows, cols]
    int32_t cols, pieces;       // blocks of a row
};

constexpr int MASK_THREADS = 256;

// A word of two 16-bit numbers, or of one of 32 bits, of which the first is number i of eight.
DEVICE uint32_t masked(uint16_t, uint32_t word, const Buckets& buckets, int first, int i) {
    return word & ((buckets.at(2 * i) >= first ? 0xffffu : 0) |
                   (buckets.at(2 * i + 1) >= first ? 0xffff0000u : 0));
}
DEVICE uint32_t masked(uint32_t, uint32_t word, const Buckets& buckets, int first, int i) {
    return buckets.at(i) >= first ? word : 0;
}

// `Bits` are a number's bits, uint16_t or uint32_t: numbers are copied, not computed with.
template <class Bits, bool VECTOR>
KERNEL(MASK_THREADS, 4) mask_buckets(const MaskBuckets p) {
    const int row = blockIdx.x / p.pieces, piece = blockIdx.x % p.pieces;
    const int first = p.first_kept[row];
    if (VECTOR) {
        const int j = EIGHT * (piece * MASK_THREADS + threadIdx.x);
        if (j >= p.cols) return;
        const int64_t at = int64_t(row) * p.cols + j;
        const Buckets buckets = Buckets::load(p.buckets + at);
        const uint4* from = reinterpret_cast<const uint4*>(static_cast<const Bits*>(p.weight) + at);
        uint4* to = reinterpret_cast<uint4*>(static_cast<Bits*>(p.out) + at);
#pragma unroll
        for (int i = 0; i < int(sizeof(Bits)) / 2; ++i) {
            uint4 words = __ldg(from + i);
            words.x = masked(Bits(), words.x, buckets, first, 4 * i);
            words.y = masked(Bits(), words.y, buckets, first, 4 * i + 1);
            words.z = masked(Bits(), words.z, buckets, first, 4 * i + 2);
            words.w = masked(Bits(), words.w, buckets, first, 4 * i + 3);
            to[i] = words;
        }
    } else {
        const int j = piece * MASK_THREADS + threadIdx.x;
        if (j >= p.cols) return;
        const int64_t at = int64_t(row) * p.cols + j;
        const Bits bits = static_cast<const Bits*>(p.weight)[at];
        static_cast<Bits*>(p.out)[at] = p.buckets[at] >= first ? bits : Bits(0);
    }
}
