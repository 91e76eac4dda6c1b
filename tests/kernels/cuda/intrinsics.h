// CUDA's own functions that kernels call by name: warps, bits, atomics, mathematics.
#pragma once

#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "block.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One block at a time runs, so a variable that stays is the block's; nothing poisons it.
#define __shared__ static
#define __constant__ static

using std::abs;
using std::isfinite;
using std::isinf;
using std::isnan;

static const int warpSize = 32;

// ---------------------------------------------------------------- waiting for others

static inline void __syncthreads(emulator::Site site = BESA_SITE) { emulator::meet_block(site); }

static inline void __syncwarp(unsigned mask = ~0u, emulator::Site site = BESA_SITE) {
    int nothing = 0;
    emulator::meet("__syncwarp", mask, site, nothing, [](int* const*) {});
}

static inline void __threadfence() {}
static inline void __threadfence_block() {}

namespace emulator {

// Each lane gets the value of the lane that `source(lane)` says, its own where that is negative.
template <class T, class Source>
static T shuffle(const char* what, unsigned mask, T value, Site site, Source source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    struct Operands {
        T value, result;
        int from;
    };
    const int lane = block.current->index % WARP;
    const int from = source(lane);
    Operands mine = {value, value, from < 0 ? lane : from};
    meet(what, mask, site, mine, [&](Operands* const* of) {
        for (int i = 0; i < WARP; ++i) {
            if (!of[i]) continue;
            if (!of[of[i]->from]) fail("%s with mask %08x reads lane %d", what, mask, of[i]->from);
            of[i]->result = of[of[i]->from]->value;
        }
    });
    return mine.result;
}

static inline unsigned ballot(const char* what, unsigned mask, bool predicate, Site site) {
    struct Operands {
        bool predicate;
        unsigned result;
    } mine = {predicate, 0};
    meet(what, mask, site, mine, [](Operands* const* of) {
        unsigned bits = 0;
        for (int i = 0; i < WARP; ++i) bits |= unsigned(of[i] && of[i]->predicate) << i;
        for (int i = 0; i < WARP; ++i)
            if (of[i]) of[i]->result = bits;
    });
    return mine.result;
}

}  // namespace emulator

template <class T>
static T __shfl_sync(unsigned mask, T value, int from, int width = 32, emulator::Site site = BESA_SITE) {
    return emulator::shuffle("__shfl_sync", mask, value, site, [=](int lane) {
        return (lane & ~(width - 1)) | (from & (width - 1));
    });
}

template <class T>
static T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                        emulator::Site site = BESA_SITE) {
    return emulator::shuffle("__shfl_up_sync", mask, value, site, [=](int lane) {
        int from = lane - int(distance & 31);
        return from < (lane & ~(width - 1)) ? -1 : from;
    });
}

template <class T>
static T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                          emulator::Site site = BESA_SITE) {
    return emulator::shuffle("__shfl_down_sync", mask, value, site, [=](int lane) {
        int from = lane + int(distance & 31);
        return from > (lane | (width - 1)) ? -1 : from;
    });
}

template <class T>
static T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                         emulator::Site site = BESA_SITE) {
    return emulator::shuffle("__shfl_xor_sync", mask, value, site, [=](int lane) {
        int from = lane ^ (bits & 31);
        return from > (lane | (width - 1)) ? -1 : from;
    });
}

static inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = BESA_SITE) {
    return emulator::ballot("__ballot_sync", mask, predicate, site);
}
static inline int __any_sync(unsigned mask, int predicate, emulator::Site site = BESA_SITE) {
    return emulator::ballot("__any_sync", mask, predicate, site) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, emulator::Site site = BESA_SITE) {
    return emulator::ballot("__all_sync", mask, predicate, site) == mask;
}

// ---------------------------------------------------------------- bits

static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
static inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
static inline int __clzll(long long v) { return v ? __builtin_clzll(v) : 64; }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __ffsll(long long v) { return __builtin_ffsll(v); }

static inline unsigned __brev(unsigned v) {
    unsigned d = 0;
    for (int i = 0; i < 32; ++i) d |= (v >> i & 1) << (31 - i);
    return d;
}

// The low, or high, word of hi:lo shifted; _rc by 32 at most.
static inline unsigned __funnelshift_rc(unsigned lo, unsigned hi, unsigned shift) {
    return unsigned(((unsigned long long)(hi) << 32 | lo) >> (shift < 32 ? shift : 32));
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
    return unsigned(((unsigned long long)(hi) << 32 | lo) >> (shift & 31));
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
    return unsigned(((unsigned long long)(hi) << 32 | lo) << (shift & 31) >> 32);
}

// Bytes of y:x; of each nibble of the selector three bits count.
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long bytes = (unsigned long long)(y) << 32 | x;
    unsigned d = 0;
    for (int i = 0; i < 4; ++i)
        d |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return d;
}

template <class To, class From>
static To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline unsigned __float_as_uint(float f) { return emulated_bits<unsigned>(f); }
static inline int __float_as_int(float f) { return emulated_bits<int>(f); }
static inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
static inline float __int_as_float(int v) { return emulated_bits<float>(v); }

// ---------------------------------------------------------------- memory

template <class T>
static T __ldg(const T* p) { return *p; }
template <class T>
static T __ldcs(const T* p) { return *p; }
template <class T>
static T __ldcg(const T* p) { return *p; }
template <class T>
static void __stcs(T* p, T v) { *p = v; }
template <class T>
static void __stcg(T* p, T v) { *p = v; }

// A read-modify-write; what was there before comes back.
#define BESA_ATOMIC(name, expression)                                          \
    template <class T>                                                         \
    static T name(T* p, typename std::common_type<T>::type v) {                \
        T old = *p;                                                            \
        *p = expression;                                                       \
        return old;                                                            \
    }
BESA_ATOMIC(atomicAdd, T(old + v))
BESA_ATOMIC(atomicMax, old < v ? v : old)
BESA_ATOMIC(atomicMin, v < old ? v : old)
BESA_ATOMIC(atomicOr, old | v)
BESA_ATOMIC(atomicAnd, old & v)
BESA_ATOMIC(atomicXor, old ^ v)
BESA_ATOMIC(atomicExch, v)

template <class T>
static T atomicCAS(T* p, typename std::common_type<T>::type is, typename std::common_type<T>::type v) {
    T old = *p;
    if (old == is) *p = v;
    return old;
}

// ---------------------------------------------------------------- numbers

template <class A, class B>
static constexpr typename std::common_type<A, B>::type min(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    // Of a number and NaN both return the number, as CUDA's do.
    return T(a) != T(a) || T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
static constexpr typename std::common_type<A, B>::type max(A a, B b) {
    typedef typename std::common_type<A, B>::type T;
    return T(a) != T(a) || T(a) < T(b) ? T(b) : T(a);
}

static inline float rsqrtf(float f) { return 1.0f / sqrtf(f); }
#define __expf expf  // the C library has declared these names
#define __logf logf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fsqrt_rn(float f) { return sqrtf(f); }
static inline float __frcp_rn(float f) { return 1.0f / f; }
