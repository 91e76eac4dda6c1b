// CUDA's vectors, with the alignment that makes one access of them.
#pragma once

#include <cstdint>

struct uint3 {
    unsigned int x, y, z;
};
static inline uint3 make_uint3(unsigned int x, unsigned int y, unsigned int z) { return {x, y, z}; }

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

#define BESA_VECTORS(name, type)                                                          \
    struct alignas(2 * sizeof(type)) name##2 {                                            \
        type x, y;                                                                        \
    };                                                                                    \
    struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 {               \
        type x, y, z, w;                                                                  \
    };                                                                                    \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }               \
    static inline name##4 make_##name##4(type x, type y, type z, type w) {                \
        return {x, y, z, w};                                                              \
    }

BESA_VECTORS(char, signed char)
BESA_VECTORS(uchar, unsigned char)
BESA_VECTORS(short, short)
BESA_VECTORS(ushort, unsigned short)
BESA_VECTORS(int, int)
BESA_VECTORS(uint, unsigned int)
BESA_VECTORS(float, float)
BESA_VECTORS(double, double)
BESA_VECTORS(longlong, long long)
BESA_VECTORS(ulonglong, unsigned long long)
