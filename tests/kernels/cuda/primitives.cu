// Kernels that do one thing each, for the tests of the emulator. A GPU can run them, too.
#include "device.cuh"

struct Arrays {
    const uint32_t* in;
    uint32_t* out;
    int n, mode;
};

// in: rows of (a, b, c); out: a row of results each.
KERNEL(32, 1) words(const Arrays p) {
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
        const uint32_t a = p.in[3 * i], b = p.in[3 * i + 1], c = p.in[3 * i + 2];
        const uint32_t d[16] = {
            permute(a, b, c),       dot4(a, b, c),          join(a, b),
            __byte_perm(a, b, c),   __funnelshift_r(a, b, c), __funnelshift_l(a, b, c),
            __brev(a),              uint32_t(__popc(a)),    uint32_t(__clz(int(a))),
            uint32_t(__ffs(int(a))), min(a, b),             uint32_t(max(int(a), int(b))),
            uint32_t(to_int(__uint_as_float(a))), __float_as_uint(float_of_bits(a)), 0, 0};
        for (int j = 0; j < 16; ++j) p.out[16 * i + j] = d[j];
    }
}

// in: floats by twos; out: both packed, and unpacked again the lower and the upper one.
template <class T>
KERNEL(32, 1) halves(const Arrays p) {
    for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
        uint32_t both = pack2(T(), __uint_as_float(p.in[2 * i]), __uint_as_float(p.in[2 * i + 1]));
        p.out[3 * i] = both;
        p.out[3 * i + 1] = __float_as_uint(unpack(T(), both));
        p.out[3 * i + 2] = __float_as_uint(unpack(T(), both >> 16));
    }
}

// in: a word a lane; out: 12 words a lane.
KERNEL(64, 1) warps(const Arrays p) {
    const int lane = threadIdx.x % 32;
    const uint32_t v = p.in[threadIdx.x];
    uint32_t sum = v;
    for (int distance = 1; distance < 32; distance *= 2) sum = scan_step(sum, distance);
    uint32_t* out = p.out + 12 * threadIdx.x;
    out[0] = sum;
    out[1] = __shfl_sync(~0u, v, 5 * lane);
    out[2] = __shfl_sync(~0u, v, lane + 3, 8);
    out[3] = __shfl_up_sync(~0u, v, 3);
    out[4] = __shfl_up_sync(~0u, v, 3, 8);
    out[5] = __shfl_down_sync(~0u, v, 3);
    out[6] = __shfl_down_sync(~0u, v, 3, 8);
    out[7] = __shfl_xor_sync(~0u, v, 5);
    out[8] = __shfl_xor_sync(~0u, v, 12, 8);
    out[9] = __ballot_sync(~0u, v & 1);
    out[10] = uint32_t(__any_sync(~0u, v == 7));
    out[11] = 0;
    if (lane % 4 < 2) out[11] = __ballot_sync(0x33333333u, v & 1);
}

// in: per lane 4 words of A, 4 of B, 1 of metadata, 4 of C; out: 4 of C.
template <class T>
KERNEL(32, 1) products(const Arrays p) {
    const uint32_t* in = p.in + 13 * threadIdx.x;
    float c[4];
    for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(in[9 + i]);
    if (p.mode < 0)
        mma(T(), c, in[0], in[1], in[2], in[3], in[4], in[5]);
    else if (p.mode == 0)
        mma_sparse<0>(T(), c, make_uint4(in[0], in[1], in[2], in[3]), in[4], in[5], in[6], in[7], in[8]);
    else
        mma_sparse<1>(T(), c, make_uint4(in[0], in[1], in[2], in[3]), in[4], in[5], in[6], in[7], in[8]);
    for (int i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = __float_as_uint(c[i]);
}

KERNEL(32, 1) products_int8(const Arrays p) {
    const uint32_t* in = p.in + 13 * threadIdx.x;
    int c[4];
    for (int i = 0; i < 4; ++i) c[i] = int(in[9 + i]);
    mma(c, in[0], in[1], in[2], in[3], in[4], in[5]);
    for (int i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = uint32_t(c[i]);
}

// Three groups of 16 bytes a thread; out: a word of each after wait<2>, wait<1>, wait<0>.
KERNEL(64, 1) copies(const Arrays p) {
    const uint32_t* shared = reinterpret_cast<const uint32_t*>(shared_memory());
    const int at = threadIdx.x * 48;
    for (int i = 0; i < 3; ++i) {
        copy16(shared_address(shared_memory() + at + 16 * i), p.in + at / 4 + 4 * i);
        if (i < 2 || p.mode == 0) commit();
    }
    uint32_t* out = p.out + 9 * threadIdx.x;
    wait<2>();
    for (int i = 0; i < 3; ++i) *out++ = shared[at / 4 + 4 * i];
    wait<1>();
    for (int i = 0; i < 3; ++i) *out++ = shared[at / 4 + 4 * i + 3];
    wait<0>();
    for (int i = 0; i < 3; ++i) *out++ = shared[at / 4 + 4 * i + 1];
}

// Sums of p.n words by all atomics at once, over blocks.
KERNEL(64, 1) atomics(const Arrays p) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.n) return;
    const uint32_t v = p.in[i];
    atomicAdd(p.out, v);
    atomicMax(p.out + 1, v);
    atomicMin(p.out + 2, v);
    atomicOr(p.out + 3, v);
    atomicAdd(reinterpret_cast<float*>(p.out + 4), float(v % 8));
    atomicMax(reinterpret_cast<int*>(p.out + 5), int(v));
    atomicAdd(reinterpret_cast<unsigned long long*>(p.out + 6), (unsigned long long)(v));
}

// Thread i reads what its neighbour in the next warp wrote; mode 1 without waiting for it.
KERNEL(256, 1) neighbours(const Arrays p) {
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
    for (int round = 0; round < p.n; ++round) {
        shared[threadIdx.x] = threadIdx.x + round;
        if (p.mode == 0) __syncthreads();
        p.out[blockIdx.x * blockDim.x + threadIdx.x] = shared[(threadIdx.x + 32) % blockDim.x];
        if (p.mode == 0) __syncthreads();
    }
}

// Mistakes, one a mode.
KERNEL(64, 1) mistakes(const Arrays p) {
    const int lane = threadIdx.x % 32;
    uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
    uint32_t v = lane;
    switch (p.mode) {
        case 0:  // a lane is missing
            if (lane != 3) v = __shfl_xor_sync(~0u, v, 1);
            break;
        case 1:  // two lanes elsewhere
            if (lane < 30)
                v = __ballot_sync(~0u, 1);
            else
                v = __shfl_sync(~0u, v, 0);
            break;
        case 2:  // half of the block at the barrier
            if (threadIdx.x < 32) __syncthreads();
            break;
        case 3:  // a warp at two barriers
            if (lane < 16)
                __syncthreads();
            else
                __syncthreads();
            break;
        case 4:
            v = __shfl_sync(0xFFFFu << (lane / 16 * 16), v, 0);
            break;
        case 5: shared[64] = v; break;
        case 6: v = *reinterpret_cast<uint32_t*>(shared_memory() + p.n % 4); break;
        case 7: copy16(8, p.in); break;
        case 8: copy16(256, p.in); break;
        case 9: v = __ldg(p.in + p.n + lane); break;
        case 10: v = __shfl_sync(1u, v, 0); break;
        case 11: v = v << p.n; break;
        case 12: {
            float c[4] = {};
            mma_sparse<0>(Bf16(), c, make_uint4(0, 0, 0, 0), 0, 0, 0, 0, 0x44444445u);
            break;
        }
    }
    p.out[threadIdx.x] = v;
}
