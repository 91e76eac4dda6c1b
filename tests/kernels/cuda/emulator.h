// device.cuh for the CPU: the same functions, with the meaning that the PTX ISA gives the instructions.
//
// A kernel that is compiled with -DBESA_EMULATOR has this file in device.cuh's place; launch.h runs it. Kernels keep to shared_memory() for what has to be found poisoned when it is read too early
// (__shared__ arrays work, but keep what was there), and do not wait for other blocks, since blocks run
// one after another.
#pragma once

#include "intrinsics.h"
#include "launch.h"

#define DEVICE static inline __attribute__((unused))
#define KERNEL(threads, blocks) static void

DEVICE char* shared_memory() { return emulator::block.shared; }

// ---------------------------------------------------------------- bits and bytes

// prmt.b32
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; ++i) {
        uint32_t nibble = selector >> 4 * i, byte = uint32_t(bytes >> (nibble & 7) * 8) & 0xFF;
        if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
        d |= byte << 8 * i;
    }
    return d;
}

// dp4a.u32.u32
DEVICE uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 0xFF) * (b >> i & 0xFF);
    return c;
}

// mad.lo.u32
DEVICE uint32_t join(uint32_t low, uint32_t high) { return high * 65536u + low; }

// shfl.sync.up.b32 and an addition where its predicate is true
DEVICE uint32_t scan_step(uint32_t v, int distance, emulator::Site site = BESA_SITE) {
    const int from = emulator::block.current->index % emulator::WARP - (distance & 31);
    uint32_t other = emulator::shuffle("scan_step", ~0u, v, site, [=](int) { return from; });
    return from < 0 ? v : v + other;
}

// ---------------------------------------------------------------- numbers

struct Bf16 {};
struct Fp16 {};

namespace emulator {

// Both conversions give NaN one pattern, PTX's.
static inline uint32_t round(Bf16, float f) {
    uint32_t word = __float_as_uint(f);
    if (f != f) return 0x7FFF;
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16;
}

static inline uint32_t round(Fp16, float f) {
    uint32_t word = __float_as_uint(f), sign = word >> 16 & 0x8000, size = word & 0x7FFFFFFF;
    if (size > 0x7F800000) return 0x7FFF;
    if (size >= 0x47800000) return sign | 0x7C00;  // 2^16 and above
    // In units of the last place of fp16: 2^-24 below 2^-14, where numbers are subnormal.
    int exponent = int(size >> 23) - 127;
    if (exponent < -14) {
        // Half of 2^-24 and less is 0; scaling and lrint's ties to even are exact.
        return sign | uint32_t(lrintf(ldexpf(__uint_as_float(size), 24)));
    }
    size -= 112u << 23;  // the exponent's new bias; a carry of the rounding goes into it
    return sign | (size + 0xFFF + (size >> 13 & 1)) >> 13;
}

static inline float number(Bf16, uint32_t half) { return __uint_as_float(half << 16); }

static inline float number(Fp16, uint32_t half) {
    uint32_t sign = half << 16 & 0x80000000, exponent = half >> 10 & 31, fraction = half & 0x3FF;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | fraction << 13);
    float size = exponent ? ldexpf(float(1024 + fraction), int(exponent) - 25)
                          : ldexpf(float(fraction), -24);
    return sign ? -size : size;
}

}  // namespace emulator

// cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32
template <class Half>
DEVICE uint32_t pack2(Half half, float low, float high) {
    return emulator::round(half, low) | emulator::round(half, high) << 16;
}

template <class Half>
DEVICE float unpack(Half half, uint32_t word) { return emulator::number(half, word & 0xFFFF); }

DEVICE float float_of_bits(uint32_t word) {
    float f;
    std::memcpy(&f, &word, 4);
    return f;
}

// cvt.rni.s32.f32: what does not fit becomes the nearest that does, NaN becomes 0.
DEVICE int to_int(float f) {
    if (f != f) return 0;
    if (f >= 2147483648.0f) return 2147483647;
    if (f < -2147483648.0f) return -2147483647 - 1;
    return int(lrintf(f));
}

// ---------------------------------------------------------------- copies to shared memory

DEVICE uint32_t shared_address(const void* p) {
    long at = static_cast<const char*>(p) - emulator::block.shared;
    if (at < 0 || at > emulator::block.shared_bytes)
        emulator::fail("shared_address of byte %ld of %d bytes of shared memory", at,
                       emulator::block.shared_bytes);
    return uint32_t(at);
}

// cp.async.cg: the bytes arrive at the wait that guarantees them; until then the target is poisoned.
DEVICE void copy16(uint32_t to, const void* from) {
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        emulator::fail("copy16 from %p to byte %u: not multiples of 16", from, to);
    if (to + 16ull > uint32_t(emulator::block.shared_bytes))
        emulator::fail("copy16 to byte %u of %d bytes of shared memory", to,
                       emulator::block.shared_bytes);
    char* target = emulator::block.shared + to;
    memset(target, emulator::POISON, 16);
    emulator::Thread& self = *emulator::block.current;
    self.copies.push_back({target, static_cast<const char*>(from), self.groups});
}

DEVICE void commit() { ++emulator::block.current->groups; }

template <int N>
DEVICE void wait() {
    emulator::Thread& self = *emulator::block.current;
    size_t arrived = 0;
    for (; arrived < self.copies.size(); ++arrived) {
        const emulator::Copy& copy = self.copies[arrived];
        if (copy.group >= self.groups - N) break;
        memcpy(copy.to, copy.from, 16);
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + arrived);
}

// ---------------------------------------------------------------- tensor cores

#include "tensor_cores.h"

// ---------------------------------------------------------------- kernels one after another

DEVICE void start_next() {}
DEVICE void wait_for_previous() {}
