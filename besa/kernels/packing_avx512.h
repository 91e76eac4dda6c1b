// Packing and unpacking a row by AVX-512 VBMI2, which closes or opens the gaps in a whole register with
// one instruction. See packing.cpp.

#pragma once

#include "packing_portable.h"

#ifdef __x86_64__

#include <immintrin.h>

#define BESA_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,bmi2,popcnt")))

namespace {

// A register of T. Loads and stores touch only the lanes in the mask, so that neither a row's end
// nor a buffer's needs care. (Compressing straight to memory is slow on some processors.)
template <class T>
struct Lanes;

template <>
struct Lanes<uint8_t> {
    using Mask = __mmask64;
    BESA_AVX512 static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi8(m, p); }
    BESA_AVX512 static void store(void* p, Mask m, __m512i x) { _mm512_mask_storeu_epi8(p, m, x); }
    BESA_AVX512 static Mask nonzero(__m512i x) { return _mm512_test_epi8_mask(x, x); }
    BESA_AVX512 static __m512i pack(Mask m, __m512i x) { return _mm512_maskz_compress_epi8(m, x); }
    BESA_AVX512 static __m512i spread(Mask m, __m512i x) { return _mm512_maskz_expand_epi8(m, x); }
};

template <>
struct Lanes<uint16_t> {
    using Mask = __mmask32;
    BESA_AVX512 static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi16(m, p); }
    BESA_AVX512 static void store(void* p, Mask m, __m512i x) { _mm512_mask_storeu_epi16(p, m, x); }
    BESA_AVX512 static Mask nonzero(__m512i x) {
        return _mm512_test_epi16_mask(x, _mm512_set1_epi16(kMagnitude<uint16_t>));
    }
    BESA_AVX512 static __m512i pack(Mask m, __m512i x) { return _mm512_maskz_compress_epi16(m, x); }
    BESA_AVX512 static __m512i spread(Mask m, __m512i x) { return _mm512_maskz_expand_epi16(m, x); }
};

template <>
struct Lanes<uint32_t> {
    using Mask = __mmask16;
    BESA_AVX512 static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi32(m, p); }
    BESA_AVX512 static void store(void* p, Mask m, __m512i x) { _mm512_mask_storeu_epi32(p, m, x); }
    BESA_AVX512 static Mask nonzero(__m512i x) {
        return _mm512_test_epi32_mask(x, _mm512_set1_epi32(kMagnitude<uint32_t>));
    }
    BESA_AVX512 static __m512i pack(Mask m, __m512i x) { return _mm512_maskz_compress_epi32(m, x); }
    BESA_AVX512 static __m512i spread(Mask m, __m512i x) { return _mm512_maskz_expand_epi32(m, x); }
};

template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

// The lowest n lanes of a register.
template <class T>
BESA_AVX512 inline typename Lanes<T>::Mask below(int64_t n) {
    return static_cast<typename Lanes<T>::Mask>(_bzhi_u64(~uint64_t(0), static_cast<unsigned>(n)));
}

struct Avx512Packing {
    template <class T>
    BESA_AVX512 static int64_t mask(const T* row, uint8_t* bits, int64_t cols) {
        int64_t count = 0;
        for (int64_t j = 0; j < cols; j += kLanes<T>) {
            const int64_t n = std::min(kLanes<T>, cols - j);
            const uint64_t word = Lanes<T>::nonzero(Lanes<T>::load(below<T>(n), row + j));
            store_bits<kLanes<T>>(bits + j / 8, word, n);
            count += _mm_popcnt_u64(word);
        }
        return count;
    }

    BESA_AVX512 static int64_t count(const uint8_t* bits, int64_t cols) {
        int64_t count = 0;
        for (int64_t j = 0; j < cols; j += kWord)
            count += _mm_popcnt_u64(load_bits<kWord>(bits + j / 8, std::min(kWord, cols - j)));
        return count;
    }

    template <class T>
    BESA_AVX512 static bool compress(const T* row, const uint8_t* bits, T* values, int64_t cols,
                                     int64_t left) {
        using Mask = typename Lanes<T>::Mask;
        for (int64_t j = 0; j < cols; j += kLanes<T>) {
            const int64_t n = std::min(kLanes<T>, cols - j);
            const uint64_t word = load_bits<kLanes<T>>(bits + j / 8, n);
            const int64_t count = _mm_popcnt_u64(word);
            left -= count;
            if (left < 0) return false;
            const __m512i x = Lanes<T>::load(below<T>(n), row + j);
            Lanes<T>::store(values, below<T>(count), Lanes<T>::pack(static_cast<Mask>(word), x));
            values += count;
        }
        return left == 0;
    }

    template <class T>
    BESA_AVX512 static bool expand(const T* values, const uint8_t* bits, T* row, int64_t cols,
                                   int64_t left) {
        using Mask = typename Lanes<T>::Mask;
        for (int64_t j = 0; j < cols; j += kLanes<T>) {
            const int64_t n = std::min(kLanes<T>, cols - j);
            const uint64_t word = load_bits<kLanes<T>>(bits + j / 8, n);
            const int64_t count = _mm_popcnt_u64(word);
            left -= count;
            if (left < 0) return false;
            const __m512i x = Lanes<T>::load(below<T>(count), values);
            Lanes<T>::store(row + j, below<T>(n), Lanes<T>::spread(static_cast<Mask>(word), x));
            values += count;
        }
        return left == 0;
    }
};

inline bool has_avx512_packing() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

}  // namespace

#endif
