// A fiber: a stack of its own and the place where it stopped. A thread of a CUDA block is one.
//
// On x86-64 a switch is a dozen instructions, some nanoseconds. Elsewhere ucontext does it, with a
// system call a switch; -DBESA_UCONTEXT asks for it.
#pragma once

#include <cstddef>
#include <cstdint>
#if !defined(__x86_64__) && !defined(BESA_UCONTEXT)
#define BESA_UCONTEXT
#endif
#ifdef BESA_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

#ifndef BESA_UCONTEXT

// Keeps what a function must preserve on the stack, and exchanges the stacks. Nothing is inlined or
// assumed across it: whoever comes back finds all variables but its own changed.
__attribute__((naked, noinline)) static void exchange_stacks(void** /* from */, void* /* to */) {
    asm volatile(
        "pushq %rbp\n"
        "pushq %rbx\n"
        "pushq %r12\n"
        "pushq %r13\n"
        "pushq %r14\n"
        "pushq %r15\n"
        "movq %rsp, (%rdi)\n"
        "movq %rsi, %rsp\n"
        "popq %r15\n"
        "popq %r14\n"
        "popq %r13\n"
        "popq %r12\n"
        "popq %rbx\n"
        "popq %rbp\n"
        "ret\n");
}

class Fiber {
public:
    // The first switch to it calls `entry`, which must not return.
    void prepare(char* stack, size_t bytes, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + bytes) - 2;  // as a call leaves it
        *top = reinterpret_cast<void*>(entry);
        for (int i = 1; i <= 6; ++i) top[-i] = nullptr;  // the six registers
        at_ = top - 6;
    }

    static void change(Fiber& from, Fiber& to) {
        exchange_stacks(&from.at_, to.at_);
        asm volatile("" ::: "memory");
    }

private:
    void* at_ = nullptr;
};

#else

class Fiber {
public:
    void prepare(char* stack, size_t bytes, void (*entry)()) {
        getcontext(&at_);
        at_.uc_stack.ss_sp = stack;
        at_.uc_stack.ss_size = bytes;
        at_.uc_link = nullptr;
        makecontext(&at_, entry, 0);
    }

    static void change(Fiber& from, Fiber& to) { swapcontext(&from.at_, &to.at_); }

private:
    ucontext_t at_;
};

#endif

}  // namespace emulator
