// Which instruction sets this CPU has. See isa.h.

#include "isa.h"

#include "abi.h"

namespace besa {

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

}  // namespace besa
