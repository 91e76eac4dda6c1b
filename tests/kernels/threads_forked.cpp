// Forks a process whose pool of threads is at work or about to rest. See test_threads.py.

#include "threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace {

// Whether all of some rows are seen.
bool all_seen(std::int64_t rows, int threads) {
    std::atomic<std::int64_t> seen{0};
    besa::over_rows(rows, threads, [&](std::int64_t) { ++seen; });
    return seen == rows;
}

}  // namespace

int main() {
    for (int i = 0; i < 300; ++i) {
        if (!all_seen(30, 5)) return 1;
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            _exit(all_seen(30, 4) ? 0 : 1);
        }
        int status = 1;
        waitpid(child, &status, 0);
        if (status != 0) return 1;
    }
    return 0;
}
