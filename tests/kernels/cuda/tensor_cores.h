// mma.sync and mma.sp.sync: the registers of a warp's lanes as matrices, and their product.
//
// The layouts are those of the PTX ISA's section on matrix fragments. A register of A and B has E
// numbers, two of 16 bits or four of 8. In lane 4 g + t:
//
//     number e of A's register r:  row g + 8 (r % 2), column E t + e + 4 E (r / 2)
//     number e of B's register r:  row E t + e + 4 E r, column g
//     C's register r:              row g + 8 (r / 2), column 2 t + r % 2
//
// A sparse A has its kept numbers in the same places, two for every four columns. Their columns are
// given by 2-bit indices: for row m and columns 16 u to 16 u + 15 in lane 4 (m % 8) + 2 SELECTOR + u,
// in its upper half for rows from 8 on, four bits for four columns, the first number's index lower.
//
// Sums are exact to double precision and rounded once. A tensor core rounds more, and in an order
// that is not documented.
#pragma once

namespace emulator {

struct Fragments {
    void* c;
    uint32_t a[4], b[4], meta;
};

// c += a b, where value(register, e) is a number and A has `k` columns, B as many rows.
template <class Sum, class Number, int E, int K, class Value>
static void multiply(Fragments* const* of, Value value, const int (*column)[K]) {
    static Sum a[16][K], b[64][8];  // not on the fiber's small stack
    for (int lane = 0; lane < WARP; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int e = 0; e < E; ++e) {
            for (int r = 0; r < 4; ++r)
                a[g + 8 * (r % 2)][E * t + e + 4 * E * (r / 2)] = value(of[lane]->a[r], e);
            for (int r = 0; r < (column ? 4 : 2); ++r)
                b[E * t + e + 4 * E * r][g] = value(of[lane]->b[r], e);
        }
    }
    for (int lane = 0; lane < WARP; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; ++r) {
            const int m = g + 8 * (r / 2), n = 2 * t + r % 2;
            Number* c = static_cast<Number*>(of[lane]->c) + r;
            Sum sum = Sum(*c);
            for (int k = 0; k < K; ++k) sum += a[m][k] * b[column ? column[m][k] : k][n];
            *c = Number(sum);
            if (*c != *c) {
                const uint32_t nan = 0x7FFFFFFF;  // the only one
                memcpy(c, &nan, sizeof nan);
            }
        }
    }
}

template <class Half>
static float half(uint32_t word, int e) { return number(Half(), word >> 16 * e & 0xFFFF); }

template <class Half>
static void multiply_dense(const char* what, Fragments& mine, Site site) {
    meet(what, ~0u, site, mine, [](Fragments* const* of) {
        multiply<double, float, 2, 16>(of, half<Half>, nullptr);
    });
}

template <class Half, int SELECTOR>
static void multiply_sparse(const char* what, Fragments& mine, Site site) {
    static_assert(SELECTOR == 0 || SELECTOR == 1, "two lanes of four give the metadata");
    meet(what, ~0u, site, mine, [what](Fragments* const* of) {
        int column[16][16];
        for (int m = 0; m < 16; ++m)
            for (int q = 0; q < 8; ++q) {
                const int lane = 4 * (m % 8) + 2 * SELECTOR + q / 4;
                const uint32_t indices = of[lane]->meta >> (m / 8 * 16 + q % 4 * 4);
                const int low = indices & 3, high = indices >> 2 & 3;
                if (low >= high)
                    fail("%s: row %d keeps numbers %d and %d of columns %d to %d, not in order",
                         what, m, low, high, 4 * q, 4 * q + 3);
                column[m][2 * q] = 4 * q + low;
                column[m][2 * q + 1] = 4 * q + high;
            }
        multiply<double, float, 2, 16>(of, half<Half>, column);
    });
}

}  // namespace emulator

DEVICE void mma(Bf16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                uint32_t b0, uint32_t b1, emulator::Site site = BESA_SITE) {
    emulator::Fragments mine = {c, {a0, a1, a2, a3}, {b0, b1}, 0};
    emulator::multiply_dense<Bf16>("mma of bf16", mine, site);
}

DEVICE void mma(Fp16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                uint32_t b0, uint32_t b1, emulator::Site site = BESA_SITE) {
    emulator::Fragments mine = {c, {a0, a1, a2, a3}, {b0, b1}, 0};
    emulator::multiply_dense<Fp16>("mma of fp16", mine, site);
}

// int8: the sum wraps around, as without .satfinite.
DEVICE void mma(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                uint32_t b1, emulator::Site site = BESA_SITE) {
    emulator::Fragments mine = {c, {a0, a1, a2, a3}, {b0, b1}, 0};
    emulator::meet("mma of int8", ~0u, site, mine, [](emulator::Fragments* const* of) {
        emulator::multiply<uint32_t, int, 4, 32>(
            of, [](uint32_t word, int e) { return uint32_t(int8_t(word >> 8 * e)); }, nullptr);
    });
}

template <int SELECTOR>
DEVICE void mma_sparse(Bf16, float (&c)[4], uint4 a, uint32_t b0, uint32_t b1, uint32_t b2,
                       uint32_t b3, uint32_t meta, emulator::Site site = BESA_SITE) {
    emulator::Fragments mine = {c, {a.x, a.y, a.z, a.w}, {b0, b1, b2, b3}, meta};
    emulator::multiply_sparse<Bf16, SELECTOR>("mma_sparse of bf16", mine, site);
}

template <int SELECTOR>
DEVICE void mma_sparse(Fp16, float (&c)[4], uint4 a, uint32_t b0, uint32_t b1, uint32_t b2,
                       uint32_t b3, uint32_t meta, emulator::Site site = BESA_SITE) {
    emulator::Fragments mine = {c, {a.x, a.y, a.z, a.w}, {b0, b1, b2, b3}, meta};
    emulator::multiply_sparse<Fp16, SELECTOR>("mma_sparse of fp16", mine, site);
}
