// Small tools that the loops of the product share: aligned memory, loops over registers, threads.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <utility>

#include "abi.h"

#define BESA_INLINE __attribute__((always_inline))

namespace besa {
namespace {

struct FreeMemory {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
using Buffer = std::unique_ptr<T[], FreeMemory>;

// Memory for `count` of T, not initialized, that begins at a cache line; null if there is none.
template <class T>
Buffer<T> buffer(std::int64_t count) {
    const std::size_t size = (count * sizeof(T) + 63) / 64 * 64 + 64;
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, size)));
}

// Where so many bytes later is.
inline const void* offset(const void* p, std::int64_t bytes) {
    return static_cast<const char*>(p) + bytes;
}

inline void* offset(void* p, std::int64_t bytes) { return static_cast<char*>(p) + bytes; }

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <class F, int... I>
BESA_INLINE inline void each_of(const F& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}

// f(0), ..., f(N - 1), with indices that are constants from the start: arrays of registers that a
// loop variable indexes, even of a loop unrolled later, would live in memory.
template <int N, class F>
BESA_INLINE inline void each(const F& f) {
    each_of(f, std::make_integer_sequence<int, N>{});
}

// How many groups a row has of so many columns; 0 stands for all of them.
inline std::int64_t groups_of(const Job& job, std::int64_t size) {
    return size ? (job.cols + size - 1) / size : 1;
}

// How many threads are worth waking: each gets some 4 µs of work, and waking one takes 2.
inline int worthwhile_threads(const Job& job, std::int64_t weights_times_tokens) {
    constexpr std::int64_t kWorkPerThread = 1 << 16;
    return static_cast<int>(least(job.threads, 1 + weights_times_tokens / kWorkPerThread));
}

// Calls lane() `lanes` times on the job's threads. Each call takes from the work that is left until
// there is none, so it does not matter whether they run at once or one after the other.
template <class F>
void in_lanes(const Job& job, int lanes, const F& lane) {
    if (lanes == 1) return lane();
    job.parallel(
        job.pool, lanes, [](void* task) { (*static_cast<const F*>(task))(); },
        const_cast<F*>(&lane));
}

}  // namespace
}  // namespace besa
