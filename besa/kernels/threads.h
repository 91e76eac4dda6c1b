// The library's own threads: OpenMP's if it was compiled with it, else a pool.

#pragma once

#include <atomic>
#include <cstdint>

namespace besa {

// Has at most `lanes` threads run lane(task), the calling one among them. Each takes from the work
// that is left until there is none, so that one alone would do all of it. As Job::parallel.
void on_threads(void* pool, int lanes, void (*lane)(void*), void* task);

// Calls row(r) for all rows; threads get runs of consecutive ones.
template <class F>
void over_rows(std::int64_t rows, int threads, const F& row) {
    std::atomic<int> next{0};
    const auto lane = [&] {
        for (int i; (i = next++) < threads;)
            for (std::int64_t r = rows * i / threads; r < rows * (i + 1) / threads; ++r) row(r);
    };
    if (threads == 1) return lane();
    on_threads(
        nullptr, threads, [](void* task) { (*static_cast<const decltype(lane)*>(task))(); },
        const_cast<void*>(static_cast<const void*>(&lane)));
}

}  // namespace besa
