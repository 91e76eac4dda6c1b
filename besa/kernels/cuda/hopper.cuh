// The instructions of sm_90a that the kernels use beside those of device.cuh: products of a whole
// warpgroup (wgmma), clusters of thread blocks, and what orders them.
//
// The tests compile the same kernels for the CPU, with emulator_wgmma.h in this file's place.
#pragma once

#include "device.cuh"

#ifdef BESA_EMULATOR
#include "emulator_wgmma.h"
#else

// ---------------------------------------------------------------- products of a warpgroup

// What wgmma has to know of B, [tokens, 64 values of 16 bits] at a `shared_address` that is a
// multiple of 1024: a token is a row of 128 bytes, of which chunk c of 16 bytes lies at c ^ (token % 8)
// (swizzle of 128 bytes, 8 rows to the next 1024 bytes). The next 16 values are 32 bytes further, the
// next 64 tokens 8192: `next` of the descriptor by so many bytes.
DEVICE uint64_t swizzled_rows(uint32_t address) {
    uint64_t d;
    asm("mov.b64 %0, {%1, %2};"
        : "=l"(d)
        : "r"((address & 0x3FFFF) >> 4 | 1 << 16), "r"(1024 >> 4 | 1 << 30));
    return d;
}

DEVICE uint64_t next(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// Before the first product, and between writing registers and a product that takes them.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last call are a group.
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but the last N groups have been computed: only then may their registers be touched.
template <int N>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Says that the registers hold what a product may still be reading: they keep their place until here.
DEVICE void keep(uint32_t (&a)[4]) {
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
}

// c += a b for [64, 16] by [16, 64], four warps together, under way until `products_wait`. A warp
// has 16 rows of a and c: a as in mma.m16n8k16; c[4 j ..+3] is row g, tokens 8 j + 2 t and + 1, then
// the same of row g + 8. All warps give the same b.
#define BESA_WGMMA(type, input)                                                                  \
    DEVICE void wgmma(type, float(&c)[32], const uint32_t(&a)[4], uint64_t b) {                  \
        asm volatile(                                                                            \
            "{ .reg .pred add; setp.ne.b32 add, 1, 0;\n"                                         \
            "wgmma.mma_async.sync.aligned.m64n64k16.f32." input "." input                        \
            " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"   \
            "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, add, 1, 1, 0; }"  \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),            \
              "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),          \
              "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),      \
              "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),      \
              "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),      \
              "+f"(c[30]), "+f"(c[31])                                                           \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    }

BESA_WGMMA(Bf16, "bf16")
BESA_WGMMA(Fp16, "f16")

// What this thread wrote to shared memory is there for wgmma, after the block's next barrier.
DEVICE void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// An address that is computed here, once, and not again for each predicated access.
DEVICE const char* once(const char* p) {
    asm("" : "+l"(p));
    return p;
}

// ---------------------------------------------------------------- bulk copies and their barriers

// A barrier is 8 bytes at a `shared_address`. Its phase ends when `count` arrivals and all bytes that
// were announced are there; then the next one begins.
DEVICE void barrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After `barrier_init`, before the cluster's next barrier: its blocks may then use them.
DEVICE void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives and announces bytes.
DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Arrives at the barrier that block `rank` of the cluster has at this address.
DEVICE void barrier_arrive(uint32_t barrier, int rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
        "  mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Until the phase of this parity has ended: 0 for the first one, then 1, and so on. The loop is in the
// assembly, so that the compiler does not take the code after it for divergent.
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "  @!done bra again; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Copies to where each of the cluster's blocks in the bit mask `blocks` has address `to`, and tells the
// barrier that each has at address `barrier`. Everything is a multiple of 16.
DEVICE void copy_to_blocks(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                           uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
        : "memory");
}

// The same to this block alone.
DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// ---------------------------------------------------------------- clusters of thread blocks

// This block among those of its cluster, and how many they are (1 without a cluster).
DEVICE int cluster_rank() {
    int d;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(d));
    return d;
}

DEVICE int cluster_size() {
    int d;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(d));
    return d;
}

// Until all threads of the cluster are here; what they wrote to memory before is there.
DEVICE void cluster_barrier() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}

// The same for threads that have only read since the last one: it does not wait for their writes.
DEVICE void cluster_barrier_after_reading() {
    asm volatile(
        "barrier.cluster.arrive.relaxed.aligned;\n"
        "barrier.cluster.wait.aligned;" ::
            : "memory");
}

// 16 bytes of what block `rank` of the cluster has at this `shared_address`.
DEVICE float4 load_of_block(uint32_t address, int rank) {
    float4 v;
    asm volatile(
        "{ .reg .b32 at; mapa.shared::cluster.u32 at, %4, %5;\n"
        "  ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at]; }"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(address), "r"(rank)
        : "memory");
    return v;
}

#endif  // BESA_EMULATOR
