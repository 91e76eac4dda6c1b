// Which instruction sets this CPU has. See isa.h.

#include "isa.h"

#include "abi.h"

namespace besa {

bool has_isa(int isa) {
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    switch (isa) {
        case kAvx2: return avx2;
        case kAvx512: return avx512;
        case kAvx512Bf16:
        case kAvx512Dpbf16:
            return avx512 && __builtin_cpu_supports("avx512vbmi2") &&
                   __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    }
#elif defined(__aarch64__)
    if (isa == kNeon) return true;  // a part of the architecture
#endif
    return isa == kPortable;
}

int best_isa() {
#ifdef __x86_64__
    // AMD's Zen 4 and 5 issue one dpbf16ps in a cycle: twice the products of their float32
    // multiply-adds. Intel's cores issue it every other cycle: half of theirs.
    if (has_isa(kAvx512Bf16)) return __builtin_cpu_is("amd") ? kAvx512Dpbf16 : kAvx512Bf16;
    if (has_isa(kAvx512)) return kAvx512;
    if (has_isa(kAvx2)) return kAvx2;
#elif defined(__aarch64__)
    return kNeon;
#endif
    return kPortable;
}

}  // namespace besa
