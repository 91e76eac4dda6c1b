// A block of threads on the CPU: who runs, who waits for whom, and what to say if that never ends.
//
// Every thread is a fiber, which runs until it has to wait for others: at a collective of its warp or
// at __syncthreads. There the last one to arrive computes for all, since the others' operands lie on
// their stacks. The order in which waiting threads go on is one of three, drawn for each block, so
// that a missing synchronization shows. Nothing here runs in parallel.
//
// A kernel's mistake ends the launch with a sentence: `fail`.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "fiber.h"
#include "vectors.h"

// CUDA's variables. They change with the fiber that runs, so the compiler must not take them for
// this file's own: static ones it would keep in registers.
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

constexpr int MAX_THREADS = 1024, WARP = 32, POISON = 0xFF;

// Where a thread waits: which operation, at which line of the kernel, for which lanes.
struct Place {
    const char* what;
    const char* file;
    int line;
    uint32_t mask;
    bool operator==(const Place& o) const {
        return line == o.line && mask == o.mask && same(what, o.what) && same(file, o.file);
    }
    static bool same(const char* a, const char* b) { return a == b || !strcmp(a, b); }
};

// From where a function is called: as a parameter's default value, BESA_SITE is the caller's place.
struct Site {
    const char* file;
    int line;
};
#define BESA_SITE {__builtin_FILE(), __builtin_LINE()}

struct Copy {
    char* to;
    const char* from;
    int group;
};

enum State { RUNS, AT_WARP, AT_BLOCK, ENDED };
enum Order { OLDEST, NEWEST, ANY };  // of the threads that can run, which one does

struct Thread {
    Fiber fiber;
    int index;
    State state;
    Place at;
    void* operands;
    std::vector<Copy> copies;  // under way: bytes that arrive at a wait
    int groups;                // committed so far
};

struct Block {
    Fiber home;  // of launch
    Thread threads[MAX_THREADS];
    Thread* current;
    Thread* ready[MAX_THREADS];  // a ring: `count` from `first` on
    uint32_t first, count;
    uint32_t at_warp[MAX_THREADS / WARP];  // lanes that wait for others of their warp
    int size, at_block, ended;
    Order order;
    uint32_t random = 1;
    char *stacks, *shared;
    int shared_bytes;
    void (*kernel)();
    char* error;
    int error_size;
    long* where;  // code that failed, bytes from the library's beginning
    bool failed;
};

Block block;

static uint32_t draw(uint32_t below) {
    block.random = block.random * 1664525u + 1013904223u;
    return uint32_t(uint64_t(block.random >> 8) * below >> 24);
}

// ---------------------------------------------------------------- mistakes

[[noreturn]] static void fail(const char* format, ...) {
    int used = snprintf(block.error, block.error_size, "thread %d of block (%u, %u, %u): ",
                        block.current->index, blockIdx.x, blockIdx.y, blockIdx.z);
    va_list list;
    va_start(list, format);
    if (used < block.error_size)
        vsnprintf(block.error + used, block.error_size - used, format, list);
    va_end(list);
    block.failed = true;
    Fiber lost;
    Fiber::change(lost, block.home);
    __builtin_unreachable();
}

static const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

// All threads wait: where they do, each place once.
static void report_deadlock() {
    int used = snprintf(block.error, block.error_size, "block (%u, %u, %u) cannot go on:", blockIdx.x,
                        blockIdx.y, blockIdx.z);
    bool said[MAX_THREADS] = {};
    const char* comma = "";
    for (int i = 0; i < block.size; ++i) {
        const Thread& first = block.threads[i];
        if (said[i]) continue;
        int count = 0;
        for (int j = i; j < block.size; ++j) {
            const Thread& other = block.threads[j];
            bool same = other.state == first.state && (first.state == ENDED || other.at == first.at);
            count += same;
            said[j] |= same;
        }
        char text[256];
        if (first.state == ENDED)
            snprintf(text, sizeof text, "have ended");
        else
            snprintf(text, sizeof text, "wait at %s (%s:%d)", first.at.what,
                     base_name(first.at.file), first.at.line);
        if (used < block.error_size)
            used += snprintf(block.error + used, block.error_size - used,
                             "%s %d threads, thread %d the first, %s", comma, count, i, text);
        comma = ";";
    }
    block.failed = true;
}

// ---------------------------------------------------------------- who runs

static Thread*& ready(uint32_t i) { return block.ready[(block.first + i) % MAX_THREADS]; }

static void change(Fiber& from) {
    if (block.count == 0) {
        Fiber::change(from, block.home);
        return;
    }
    // The newest first lets a warp run far ahead of the others, the oldest first keeps them together.
    Thread*& oldest = ready(0);
    if (block.order == NEWEST) std::swap(oldest, ready(block.count - 1));
    if (block.order == ANY) std::swap(oldest, ready(draw(block.count)));
    Thread* next = oldest;
    ++block.first, --block.count;
    block.current = next;
    threadIdx.x = next->index;
    if (&next->fiber != &from) Fiber::change(from, next->fiber);  // itself, if it only let others
}

static void stop(State state) {
    block.current->state = state;
    change(block.current->fiber);
}

static void go_on(Thread& thread) {
    thread.state = RUNS;
    ready(block.count++) = &thread;
}

static void run_thread() {
    block.kernel();
    ++block.ended;
    stop(ENDED);
}

// ---------------------------------------------------------------- who waits for whom

// Waits for all lanes of `mask`; then `all(operands of the lanes)` has been called once. The other
// lanes' pointers are null.
template <class Operands, class All>
static void meet(const char* what, uint32_t mask, Site site, Operands& operands, All all) {
    Thread& self = *block.current;
    const int warp = self.index / WARP, lane = self.index % WARP;
    Thread* lanes = block.threads + warp * WARP;
    self.at = {what, site.file, site.line, mask};
    self.operands = &operands;
    const int there = block.size - warp * WARP;
    const uint32_t exist = there >= WARP ? ~0u : (1u << there) - 1;
    if (!(mask >> lane & 1)) fail("%s with mask %08x, which leaves the thread out", what, mask);
    if (mask & ~exist) fail("%s with mask %08x, which has lanes past the block", what, mask);
    block.at_warp[warp] |= 1u << lane;
    if (mask & ~block.at_warp[warp]) {
        stop(AT_WARP);
        return;
    }
    Operands* of[WARP] = {};
    for (int i = 0; i < WARP; ++i) {
        if (!(mask >> i & 1)) continue;
        const Place& other = lanes[i].at;
        if (!(other == self.at))
            fail("waits at %s (%s:%d) for mask %08x, and lane %d at %s (%s:%d) for mask %08x", what,
                 base_name(site.file), site.line, mask, i, other.what, base_name(other.file),
                 other.line, other.mask);
        of[i] = static_cast<Operands*>(lanes[i].operands);
    }
    all(of);
    block.at_warp[warp] &= ~mask;
    for (int i = 0; i < WARP; ++i)
        if (i != lane && mask >> i & 1) go_on(lanes[i]);
}

static void meet_block(Site site) {
    Thread& self = *block.current;
    const int first = self.index / WARP * WARP;
    self.at = {"__syncthreads", site.file, site.line, ~0u};
    for (int i = first; i < first + WARP && i < block.size; ++i) {
        const Thread& other = block.threads[i];
        if (other.state == AT_BLOCK && !(other.at == self.at))
            fail("__syncthreads (%s:%d), and lane %d of its warp at another (%s:%d)",
                 base_name(site.file), site.line, i - first, base_name(other.at.file),
                 other.at.line);
    }
    if (++block.at_block < block.size) {
        stop(AT_BLOCK);
        return;
    }
    block.at_block = 0;
    for (int i = 0; i < block.size; ++i)
        if (&block.threads[i] != &self) go_on(block.threads[i]);
}

}  // namespace emulator
