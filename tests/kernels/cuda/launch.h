// A launch on the CPU: memory for the threads, what the processor says of a wrong access, the blocks.
//
// Shared memory ends where no page is, and so does every stack: an access past them is a fault of the
// processor. A misaligned one is trapped by what the compiler adds (-fsanitize=alignment). Both become
// a sentence, as other mistakes do.
#pragma once

#include <csignal>
#include <sys/mman.h>
#include <ucontext.h>

#include "block.h"

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];  // the linker's

namespace emulator {

constexpr int MAX_SHARED = 227 * 1024;
constexpr size_t PAGE = 65536, STACK = 2 * PAGE;  // a page of any machine; one of the two stays empty

// ---------------------------------------------------------------- memory

// Shared memory's end is the end of its last page, behind which there is none; `bytes` are rounded
// up to 16, so that its beginning is aligned. Given back with the launch: a process may have 65,530
// mappings, and every stack takes two.
class Memory {
public:
    Memory(int threads, int bytes) : total_(threads * STACK + PAGE + ROOM + PAGE) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* all = mmap(nullptr, total_, PROT_NONE, flags, -1, 0);
        if (all == MAP_FAILED) return;
        memory_ = static_cast<char*>(all);
        there = true;
        for (int i = 0; i < threads; ++i)
            there &= !mprotect(memory_ + i * STACK + PAGE, STACK - PAGE, PROT_READ | PROT_WRITE);
        there &= !mprotect(memory_ + threads * STACK + PAGE, ROOM, PROT_READ | PROT_WRITE);
        block.stacks = memory_;
        block.shared = memory_ + threads * STACK + PAGE + ROOM - (bytes + 15) / 16 * 16;
        block.shared_bytes = bytes;
    }
    ~Memory() {
        if (memory_) munmap(memory_, total_);
    }
    bool there = false;

private:
    static constexpr size_t ROOM = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
    size_t total_;
    char* memory_ = nullptr;
};

static void on_fault(int signal, siginfo_t* info, void* context) {
    long pc = 0;
#if defined(__x86_64__)
    pc = long(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
    pc = long(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#else
    (void)context;
#endif
    *block.where = pc - long(__ehdr_start);
    const char* at = static_cast<const char*>(info->si_addr);
    const char* stack = block.stacks + block.current->index * STACK;
    if (signal != SIGSEGV && signal != SIGBUS)
        fail("a misaligned access, an index past a local array, a shift too far or a division by 0");
    if (at >= stack && at < stack + PAGE) fail("local variables take more than %zu bytes", STACK - PAGE);
    long beyond = at - block.shared;
    if (beyond >= -long(PAGE) - MAX_SHARED && beyond < long(MAX_SHARED + PAGE))
        fail("an access to byte %ld of %d bytes of shared memory", beyond, block.shared_bytes);
    fail("an access to address %p, where nothing is", info->si_addr);
}

// Catches faults while it lives.
class Faults {
public:
    Faults() {
        stack_t stack = {};
        stack.ss_sp = stack_, stack.ss_size = sizeof stack_;
        sigaltstack(&stack, &stack_before_);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        // Not masked meanwhile: the handler does not return but changes to the fiber of launch.
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &action, &before_[i]);
    }
    ~Faults() {
        for (int i = 0; i < 5; ++i) sigaction(SIGNALS[i], &before_[i], nullptr);
        sigaltstack(&stack_before_, nullptr);
    }

private:
    static constexpr int SIGNALS[5] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
    struct sigaction before_[5];
    stack_t stack_before_;
    char stack_[32768];
};

// ---------------------------------------------------------------- launch

static bool run_block() {
    block.first = block.count = 0;
    block.at_block = block.ended = 0;
    memset(block.at_warp, 0, sizeof block.at_warp);
    memset(block.shared, POISON, (block.shared_bytes + 15) / 16 * 16);
    block.order = Order(draw(3));
    for (int i = 0; i < block.size; ++i) {
        Thread& thread = block.threads[i];
        thread.index = i;
        thread.copies.clear();
        thread.groups = 0;
        thread.fiber.prepare(block.stacks + i * STACK, STACK, run_thread);
        go_on(thread);
    }
    change(block.home);
    if (!block.failed && block.ended < block.size) report_deadlock();
    return !block.failed;
}

template <class Argument>
struct Call {
    static void (*kernel)(Argument);
    static const Argument* argument;
    static void run() { kernel(*argument); }
};
template <class Argument>
void (*Call<Argument>::kernel)(Argument);
template <class Argument>
const Argument* Call<Argument>::argument;

struct Launch {
    const void* argument;
    long size;
    int grid_x, grid_y, grid_z, threads, shared;
    char* error;
    int error_size;
    long* where;
};

// 0, or 1 with `error` filled.
template <class Argument>
static int launch(void (*kernel)(Argument), const Launch& l) {
    static_assert(sizeof(Argument) <= 4096, "a kernel's argument has 4096 bytes at most");
    block.error = l.error, block.error_size = l.error_size, block.where = l.where;
    block.failed = false;
    *l.where = 0;
    auto refuse = [&](const char* why, long is, long limit) {
        snprintf(l.error, l.error_size, "%s: %ld, not %ld", why, is, limit);
        return 1;
    };
    if (l.size != long(sizeof(Argument))) return refuse("bytes of the argument", l.size, sizeof(Argument));
    if (l.threads < 1 || l.threads > MAX_THREADS) return refuse("threads", l.threads, MAX_THREADS);
    if (l.shared < 0 || l.shared > MAX_SHARED) return refuse("bytes of shared memory", l.shared, MAX_SHARED);
    if (l.grid_x < 1) return refuse("blocks along x", l.grid_x, 1);
    if (l.grid_y < 1 || l.grid_y > 65535) return refuse("blocks along y", l.grid_y, 65535);
    if (l.grid_z < 1 || l.grid_z > 65535) return refuse("blocks along z", l.grid_z, 65535);
    Memory memory(l.threads, l.shared);
    if (!memory.there) return refuse("memory for the stacks", 0, 1);
    alignas(Argument) char argument[sizeof(Argument)];
    memcpy(argument, l.argument, sizeof argument);
    Call<Argument>::kernel = kernel;
    Call<Argument>::argument = reinterpret_cast<const Argument*>(argument);
    block.kernel = Call<Argument>::run;
    block.size = l.threads;
    // The same launch has the same order of threads, whatever ran before.
    block.random = uint32_t(l.grid_x + 3 * l.grid_y + 5 * l.threads + 7 * l.shared);
    blockDim = dim3(l.threads);
    gridDim = dim3(l.grid_x, l.grid_y, l.grid_z);
    Faults faults;
    for (int z = 0; z < l.grid_z; ++z)
        for (int y = 0; y < l.grid_y; ++y)
            for (int x = 0; x < l.grid_x; ++x) {
                blockIdx = make_uint3(x, y, z);
                if (!run_block()) return 1;
            }
    return 0;
}

}  // namespace emulator

// The function that Python calls for one kernel.
#define EMULATE(entry, ...)                                                                     \
    extern "C" __attribute__((visibility("default"))) int entry(const emulator::Launch* launch) { \
        return emulator::launch(__VA_ARGS__, *launch);                                          \
    }
