// Serves the functions of a library to a process of another architecture: remote LIBRARY, by standard
// input and output. arm.py is the other side, and has it run by an emulator.
//
// A request is 12 numbers of 64 bits, the first a letter; each answer is one number and what follows:
//
//     s size             stores the `size` bytes that follow; answers their address
//     l address size     answers 0, and the bytes there
//     c 0 arguments...   calls the function whose name follows, 32 bytes; answers its result
//     f                  frees all that was stored; answers 0
//
// An argument takes a register of 64 bits or a place of 8 bytes on the stack, whatever its type: so
// it is on 64-bit Arm under Linux.

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <vector>

using Number = std::int64_t;

namespace {

struct Mapping {
    void* start;
    std::size_t size;
};

std::vector<Mapping> mappings;

// Memory that ends where none is: reading past it is a crash.
char* guarded(std::size_t size) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t whole = (size + page - 1) / page * page;
    char* start = static_cast<char*>(mmap(nullptr, whole + page, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(start + whole, page, PROT_NONE);
    mappings.push_back({start, whole + page});
    return start + whole - size;
}

void free_all() {
    for (const Mapping& one : mappings) munmap(one.start, one.size);
    mappings.clear();
}

Number call(void* library, const char* name, const Number* a) {
    using Function = Number (*)(Number, Number, Number, Number, Number, Number, Number, Number,
                                Number, Number);
    const auto function = reinterpret_cast<Function>(dlsym(library, name));
    return function(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]);
}

void answer(Number number) { std::fwrite(&number, sizeof number, 1, stdout); }

}  // namespace

int main(int, char** argv) {
    void* library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::fputs(dlerror(), stderr), 1;
    for (Number request[12]; std::fread(request, sizeof request, 1, stdin) == 1;) {
        const std::size_t size = static_cast<std::size_t>(request[0] == 's' ? request[1] : request[2]);
        char name[32];
        switch (request[0]) {
            case 's': {
                char* to = guarded(size);
                if (std::fread(to, 1, size, stdin) != size) return 1;
                answer(reinterpret_cast<Number>(to));
                break;
            }
            case 'l':
                answer(0);
                std::fwrite(reinterpret_cast<const char*>(request[1]), 1, size, stdout);
                break;
            case 'c':
                if (std::fread(name, sizeof name, 1, stdin) != 1) return 1;
                answer(call(library, name, request + 2));
                break;
            default:
                free_all();
                answer(0);
        }
        std::fflush(stdout);
    }
}
