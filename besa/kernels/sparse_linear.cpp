// Which instruction set multiplies. See sparse_linear.h.

#include "sparse_linear.h"

namespace besa {

namespace {

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAvx512Dpbf16 = 4 };

}  // namespace

int last_isa() {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        return kAvx512Dpbf16;
    if (avx512) return kAvx512;
    if (avx2) return kAvx2;
#endif
    return kPortable;
}

int best_isa() {
    const int last = last_isa();
#ifdef __x86_64__
    // AMD's Zen 4 and 5 issue one dpbf16ps in a cycle: twice the products of their float32
    // multiply-adds. Intel's cores issue it every other cycle: half of theirs.
    if (last == kAvx512Dpbf16 && !__builtin_cpu_is("amd")) return kAvx512Bf16;
#endif
    return last;
}

int sparse_linear(const Job& job, int isa) {
    if (isa > last_isa()) return kUnsupported;
    switch (isa) {
#ifdef __x86_64__
        case kAvx512Dpbf16: return sparse_linear_avx512_dpbf16(job);
        case kAvx512Bf16: return sparse_linear_avx512_bf16(job);
        case kAvx512: return sparse_linear_avx512(job);
        case kAvx2: return sparse_linear_avx2(job);
#endif
        default: return sparse_linear_portable(job);
    }
}

}  // namespace besa
