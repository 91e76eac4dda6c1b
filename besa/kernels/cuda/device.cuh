// The GPU instructions that the kernels are made of, one function each.
//
// NVRTC compiles the kernels without any header but these. The tests compile the same kernels for the
// CPU, with emulator.h in this file's place: what a kernel does with the GPU goes through here, or
// through CUDA's threadIdx, blockIdx, gridDim, blockDim, __syncthreads, __syncwarp, __shfl_sync,
// __shfl_xor_sync, __ballot_sync, __popc, __funnelshift_r, __funnelshift_rc and __ldg.
#pragma once

#ifdef BESA_EMULATOR
#include "emulator.h"
#else

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#define DEVICE static __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

extern __shared__ __align__(128) char dynamic_shared[];

// The block's shared memory, as much as the launch asked for.
DEVICE char* shared_memory() { return dynamic_shared; }

// ---------------------------------------------------------------- bits and bytes

// Four bytes picked from a (0 to 3) and b (4 to 7) by the nibbles of `selector`, whose top bit makes
// a byte of the picked byte's sign.
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

// c + the sum of a's bytes times b's, all unsigned.
DEVICE uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// low | high << 16, as a multiplication: the pipe that shifts and permutes is the busiest.
DEVICE uint32_t join(uint32_t low, uint32_t high) {
    uint32_t d;
    asm("mad.lo.u32 %0, %1, 65536, %2;" : "=r"(d) : "r"(high), "r"(low));
    return d;
}

// v + the v of the lane that is `distance` below, where there is one.
DEVICE uint32_t scan_step(uint32_t v, int distance) {
    uint32_t d;
    asm volatile(
        "{ .reg .pred p; .reg .b32 u;\n"
        "  shfl.sync.up.b32 u|p, %1, %2, 0, 0xffffffff;\n"
        "  mov.b32 %0, %1;\n"
        "  @p add.u32 %0, %1, u; }"
        : "=r"(d)
        : "r"(v), "r"(distance));
    return d;
}

// ---------------------------------------------------------------- numbers

struct Bf16 {};
struct Fp16 {};

// Two numbers rounded to 16 bits, ties to even; the first one in the low half.
DEVICE uint32_t pack2(Bf16, float low, float high) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

DEVICE uint32_t pack2(Fp16, float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// The number in the low half of a word.
DEVICE float unpack(Bf16, uint32_t word) {
    float f;
    asm("mov.b32 %0, %1;" : "=f"(f) : "r"(word << 16));
    return f;
}

DEVICE float unpack(Fp16, uint32_t word) {
    float f;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }"
        : "=f"(f)
        : "r"(word));
    return f;
}

DEVICE float float_of_bits(uint32_t word) {
    float f;
    asm("mov.b32 %0, %1;" : "=f"(f) : "r"(word));
    return f;
}

// To the nearest whole number, ties to even.
DEVICE int to_int(float f) {
    int d;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(d) : "f"(f));
    return d;
}

// ---------------------------------------------------------------- copies to shared memory

DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes to a `shared_address`, under way until `wait`.
DEVICE void copy16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from));
}

DEVICE void commit() { asm volatile("cp.async.commit_group;"); }

// Until all but the last N committed groups have arrived, of this thread's.
template <int N>
DEVICE void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---------------------------------------------------------------- tensor cores

#define BESA_MMA(type, input)                                                                 \
    DEVICE void mma(type, float(&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,   \
                    uint32_t b0, uint32_t b1) {                                               \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." input "." input                 \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"             \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
                     : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                 \
    }                                                                                         \
    template <int SELECTOR>                                                                   \
    DEVICE void mma_sparse(type, float(&c)[4], uint4 a, uint32_t b0, uint32_t b1,             \
                           uint32_t b2, uint32_t b3, uint32_t meta) {                         \
        asm volatile("mma.sp" BESA_ORDERED ".sync.aligned.m16n8k32.row.col.f32." input "."    \
                     input ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, "             \
                     "{%0,%1,%2,%3}, %12, %13;"                                               \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                         \
                     : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(b2),     \
                       "r"(b3), "r"(meta), "n"(SELECTOR));                                    \
    }

// Indices of a group are always ascending here, which sm_90 and later want to be told.
#define BESA_ORDERED "::ordered_metadata"

// c += a b for [16, 16] by [16, 8], and for a with 2 of 4 kept, [16, 32] by [32, 8].
BESA_MMA(Bf16, "bf16")
BESA_MMA(Fp16, "f16")

// c += a b for int8 [16, 32] by [32, 8].
DEVICE void mma(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------- kernels one after another

// The next kernel of the stream may start (programmatic dependent launch, sm_90).
DEVICE void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the kernel before has ended, and all it wrote is there.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif  // BESA_EMULATOR
