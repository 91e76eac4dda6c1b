// Uses the threads of a library without OpenMP from several callers at once. See test_threads.py.

#include "each_once.h"
#include "threads.h"

#include <atomic>
#include <thread>
#include <vector>

namespace {

template <class F>
void run(int lanes, const F& lane) {
    besa::on_threads(
        nullptr, lanes, [](void* task) { (*static_cast<F*>(task))(); }, const_cast<F*>(&lane));
}

// Lanes that end when all have begun.
void at_once(int lanes) {
    std::atomic<int> begun{0};
    run(lanes, [&] {
        for (++begun; begun < lanes;) std::this_thread::yield();
    });
}

}  // namespace

int main() {
    for (int lanes = 2; lanes < 6; ++lanes) at_once(lanes);
    std::atomic<bool> right{true};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&] {
            for (int i = 0; i < 500; ++i)
                if (!each_once(i % 37, 1 + i % 5)) right = false;
        });
    for (std::thread& caller : callers) caller.join();
    return right ? 0 : 1;
}
