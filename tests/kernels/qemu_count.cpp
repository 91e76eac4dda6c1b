// A plugin for QEMU's emulators that tells at the end how many instructions ran. See arm.py.
//
// Debian has no header of theirs, so what is used of it stands here (version 1: QEMU up to 8).

#include <cstddef>
#include <cstdint>
#include <cstdio>

extern "C" {

struct qemu_plugin_tb;  // instructions without a jump between them
std::size_t qemu_plugin_tb_n_insns(const qemu_plugin_tb* block);
void qemu_plugin_register_vcpu_tb_trans_cb(std::uint64_t id,
                                           void (*seen)(std::uint64_t, qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_inline(qemu_plugin_tb* block, int operation, void* to,
                                              std::uint64_t operand);
void qemu_plugin_register_atexit_cb(std::uint64_t id, void (*end)(std::uint64_t, void*), void*);

static std::uint64_t count;

static void add(std::uint64_t, qemu_plugin_tb* block) {
    constexpr int kAdd = 0;
    qemu_plugin_register_vcpu_tb_exec_inline(block, kAdd, &count, qemu_plugin_tb_n_insns(block));
}

static void tell(std::uint64_t, void*) {
    std::printf("%llu\n", static_cast<unsigned long long>(count));
    std::fflush(stdout);
}

int qemu_plugin_version = 1;

int qemu_plugin_install(std::uint64_t id, const void*, int, char**) {
    qemu_plugin_register_vcpu_tb_trans_cb(id, add);
    qemu_plugin_register_atexit_cb(id, tell, nullptr);
    return 0;
}
}
