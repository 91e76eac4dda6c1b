// Which instruction sets this CPU has. See isa.h.

#include "isa.h"

#include <cstddef>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "abi.h"

#ifdef BESA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace besa {

#ifdef __aarch64__
namespace {

// Optional instructions: where Linux tells of them (the numbers are part of its interface, and older
// headers lack their names), and the name that macOS gives them.
struct Feature {
    unsigned long word;
    int bit;
    const char* name;
};

constexpr unsigned long kHwcap = 16, kHwcap2 = 26;
constexpr Feature kDotProducts{kHwcap, 20, "hw.optional.arm.FEAT_DotProd"};
constexpr Feature kFp16Products{kHwcap, 23, "hw.optional.arm.FEAT_FHM"};
constexpr Feature kBf16Products{kHwcap2, 14, "hw.optional.arm.FEAT_BF16"};

bool has(const Feature& feature) {
#ifdef __linux__
    return getauxval(feature.word) >> feature.bit & 1;
#elif defined(__APPLE__)
    int there = 0;
    std::size_t size = sizeof(there);
    return sysctlbyname(feature.name, &there, &size, nullptr, 0) == 0 && there;
#else
    return false;
#endif
}

}  // namespace
#endif

#ifdef __x86_64__
namespace {

// Not every compiler that has the instructions can also be asked for them by name.

#ifdef BESA_AVX2_VNNI
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#ifdef BESA_AMX
// With AMX for bfloat16 and int8. Linux saves its registers (8 KiB of them) for those processes only
// that have asked, once for all their threads. It refuses if it is too old.
bool may_use_amx() {
    constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, int8
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // part of Linux's interface
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace
#endif

bool has_isa(int isa) {
#ifdef __x86_64__
    __builtin_cpu_init();
    // F16C is older than AVX2, and not each clang knows its name.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq");
    switch (isa) {
        case kAvx2: return avx2;
#ifdef BESA_AVX2_VNNI
        case kAvx2Vnni: return avx2 && has_avx_vnni();
#endif
        case kAvx512: return avx512;
        case kAvx512Bf16:
        case kAvx512Dpbf16:
            return avx512 && __builtin_cpu_supports("avx512vbmi2") &&
                   __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#ifdef BESA_AMX
        case kAvx512Amx: {
            static const bool amx = has_isa(kAvx512Bf16) && may_use_amx();
            return amx;
        }
#endif
    }
#elif defined(__aarch64__)
    static const bool dot = has(kDotProducts);
    static const bool bf16 = dot && has(kFp16Products) && has(kBf16Products);
    switch (isa) {
        case kNeon: return true;  // a part of the architecture
        case kNeonDot: return dot;
        case kNeonBf16: return bf16;
    }
#endif
    return isa == kPortable;
}

int best_isa() {
#ifdef __x86_64__
    // AMD's Zen 4 and 5 issue one dpbf16ps in a cycle: twice the products of their float32
    // multiply-adds. Intel's cores issue it every other cycle: half of theirs.
    if (has_isa(kAvx512Amx)) return kAvx512Amx;
    if (has_isa(kAvx512Bf16)) return __builtin_cpu_is("amd") ? kAvx512Dpbf16 : kAvx512Bf16;
    if (has_isa(kAvx512)) return kAvx512;
    if (has_isa(kAvx2Vnni)) return kAvx2Vnni;
    if (has_isa(kAvx2)) return kAvx2;
#elif defined(__aarch64__)
    if (has_isa(kNeonBf16)) return kNeonBf16;
    return has_isa(kNeonDot) ? kNeonDot : kNeon;
#endif
    return kPortable;
}

}  // namespace besa
