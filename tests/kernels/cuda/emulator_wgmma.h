// hopper.cuh for the CPU: products of a warpgroup, and clusters of blocks.
//
// A product's registers and shared memory are read, and its sums written, at any time between its issue
// and the wait for its group. Here that is at one of the two ends, drawn for each group: a kernel that
// overwrites x or the weights of a product under way, or reads sums too early, gets wrong ones. The rows
// of a warp depend on its own lanes alone, so that warps need not meet. What is not seen: a missing
// publish_to_products, and warps of a group that differ in b.
//
// Blocks run one after another. So those of a cluster run in three launches (see `emulate_cluster`). In
// the first one it is noted what each copies to the others (multicast); in the second one they get it,
// and leave a copy of their shared memory at each barrier of the cluster; in the third one they find
// what the others have left there. That is right for blocks whose copies and arrivals follow the same
// schedule: an arrival at another block's barrier counts for this block's own, in the expectation that
// the other one does the same. What is not seen: a block that is ahead of the others, or that ends while
// they still need its memory.
#pragma once

#include <map>

namespace emulator {

// ---------------------------------------------------------------- products of a warpgroup

struct Product {
    float* c;
    const uint32_t* a;
    uint64_t b;
    float (*number)(uint32_t half);
};

struct Products {
    std::vector<Product> issued;  // not computed yet
    std::vector<size_t> groups;   // how many each committed group has
    size_t open = 0;              // issued since the last commit
    bool fenced = false;
};

static Products products[MAX_THREADS];

static Products& own_products() { return products[block.current->index]; }

// Number `k` of row `n` of B, whose descriptor says: K-major, swizzle of 128 bytes.
static uint16_t number_of_b(uint64_t b, int n, int k) {
    uint32_t start = (b & 0x3FFF) << 4, eight_rows = (b >> 32 & 0x3FFF) << 4;
    uint32_t at = start + n / 8 * eight_rows + n % 8 * 128 + 2 * k;
    at ^= (at >> 7 & 7) << 4;
    if (at + 2 > uint32_t(block.shared_bytes)) fail("wgmma reads byte %u of shared memory", at);
    uint16_t half;
    memcpy(&half, block.shared + at, sizeof half);
    return half;
}

// One product for the 16 rows of a warp; `of` has its lanes' products.
static void compute(const Product* const* of) {
    static double a[16][16], b[16][64];
    for (int lane = 0; lane < WARP; ++lane) {
        if (of[lane]->b != of[0]->b) fail("wgmma: lane %d has another descriptor", lane);
        for (int r = 0; r < 4; ++r)
            for (int e = 0; e < 2; ++e)
                a[lane / 4 + 8 * (r % 2)][2 * (lane % 4) + e + 8 * (r / 2)] =
                    of[lane]->number(of[lane]->a[r] >> 16 * e & 0xFFFF);
    }
    for (int n = 0; n < 64; ++n)
        for (int k = 0; k < 16; ++k) b[k][n] = of[0]->number(number_of_b(of[0]->b, n, k));
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 32; ++i) {
            const int m = lane / 4 + 8 * (i / 2 % 2), n = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
            double sum = of[lane]->c[i];
            for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
            of[lane]->c[i] = float(sum);
        }
}

// Computes the oldest groups of a warp, until `left` are left.
static void compute_groups(Products* const* of, size_t left) {
    while (of[0]->groups.size() > left) {
        const size_t count = of[0]->groups.front();
        for (size_t i = 0; i < count; ++i) {
            const Product* one[WARP];
            for (int lane = 0; lane < WARP; ++lane) {
                if (of[lane]->groups.front() != count) fail("wgmma: lanes issued different products");
                one[lane] = &of[lane]->issued[i];
            }
            compute(one);
        }
        for (int lane = 0; lane < WARP; ++lane) {
            Products& p = *of[lane];
            p.issued.erase(p.issued.begin(), p.issued.begin() + count);
            p.groups.erase(p.groups.begin());
        }
    }
}

static void issue(const char* what, float* c, const uint32_t* a, uint64_t b,
                  float (*number)(uint32_t)) {
    Products& p = own_products();
    if (!p.fenced) fail("%s without products_begin before it", what);
    if (b >> 62 != 1 || (b >> 49 & 7) != 0) fail("%s: not a swizzle of 128 bytes", what);
    p.issued.push_back({c, a, b, number});
    ++p.open;
}

static float number_bf16(uint32_t half) { return number(Bf16(), half); }
static float number_fp16(uint32_t half) { return number(Fp16(), half); }

// ---------------------------------------------------------------- clusters

// A bulk copy to the blocks of a mask, which arrives at a wait for the barrier's phase.
struct Piece {
    uint32_t to, bytes;
    const char* from;
    long phase;
    uint32_t blocks;
};

struct Cluster {
    int size = 1, again = 0;
    std::map<std::pair<long, long>, std::vector<char>> left;  // by block and barrier
    std::map<std::pair<long, uint32_t>, std::vector<Piece>> pieces;  // by block and barrier
    long block_now = -1, passed = 0;         // threads of the block that have passed a barrier
};

static Cluster cluster;

static long block_at(int rank) {
    const long x = blockIdx.x - blockIdx.x % cluster.size + rank;
    return (long(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + x;
}

// What block `rank` has left at the barrier that this thread has passed last.
static std::pair<long, long> left_by(int rank) {
    return {block_at(rank), (cluster.passed - 1) / block.size};
}

// ---------------------------------------------------------------- barriers

struct Barrier {
    uint32_t count, pending;
    long bytes, phase;
};

static std::map<uint32_t, Barrier> barriers;

static Barrier& barrier_at(uint32_t address) {
    const auto found = barriers.find(address);
    if (found == barriers.end()) fail("no barrier at byte %u", address);
    return found->second;
}

static void arrive(Barrier& b) {
    if (!b.pending) fail("more arrivals at a barrier than it was made for");
    if (!--b.pending && !b.bytes) b.pending = b.count, ++b.phase;
}

// What the cluster's blocks copy to this one in the barrier's present phase, as far as it is known.
template <class Each>
static void pieces_of(uint32_t address, Each each) {
    const int own = blockIdx.x % cluster.size;
    for (int rank = 0; rank < cluster.size; ++rank)
        for (const Piece& piece : cluster.pieces[{block_at(rank), address}])
            if (piece.phase == barrier_at(address).phase && piece.blocks >> own & 1) each(piece);
}

// Lets all other threads that can go on do so first.
static void let_others() {
    Thread& self = *block.current;
    if (block.order == NEWEST)
        --block.first, ++block.count, ready(0) = &self;
    else
        go_on(self);
    change(self.fiber);
}

}  // namespace emulator

// The blocks of the next launch form clusters of `size` along x. `again`: 0, 1, 2 for its three runs.
extern "C" __attribute__((visibility("default"))) void emulate_cluster(int size, int again) {
    emulator::cluster.size = size;
    emulator::cluster.again = again;
    emulator::cluster.block_now = -1;
    if (!again) emulator::cluster.left.clear(), emulator::cluster.pieces.clear();
}

// ---------------------------------------------------------------- as in hopper.cuh

DEVICE uint64_t swizzled_rows(uint32_t address) {
    if (address % 1024) emulator::fail("swizzled_rows at byte %u, not a multiple of 1024", address);
    return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | 1 << 16 | (address & 0x3FFFF) >> 4;
}

DEVICE uint64_t next(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

DEVICE void products_begin() { emulator::own_products().fenced = true; }

DEVICE void products_commit(emulator::Site site = BESA_SITE) {
    emulator::Products& mine = emulator::own_products();
    mine.groups.push_back(mine.open);
    mine.open = 0;
    mine.fenced = false;
    emulator::meet("wgmma.commit_group", ~0u, site, mine, [](emulator::Products* const* of) {
        if (emulator::draw(2)) emulator::compute_groups(of, 0);
    });
}

template <int N>
DEVICE void products_wait(emulator::Site site = BESA_SITE) {
    emulator::meet("wgmma.wait_group", ~0u, site, emulator::own_products(),
                   [](emulator::Products* const* of) { emulator::compute_groups(of, N); });
}

DEVICE void keep(uint32_t (&)[4]) {}
DEVICE const char* once(const char* p) { return p; }

DEVICE void wgmma(Bf16, float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
    emulator::issue("wgmma of bf16", c, a, b, emulator::number_bf16);
}

DEVICE void wgmma(Fp16, float (&c)[32], const uint32_t (&a)[4], uint64_t b) {
    emulator::issue("wgmma of fp16", c, a, b, emulator::number_fp16);
}

DEVICE void publish_to_products() {}

DEVICE void barrier_init(uint32_t barrier, uint32_t count) {
    if (barrier % 8) emulator::fail("a barrier at byte %u, not a multiple of 8", barrier);
    emulator::barriers[barrier] = {count, count, 0, 0};
    if (emulator::cluster.size == 1)  // these are kept for the second launch alone
        emulator::cluster.pieces.clear();
}

DEVICE void publish_barriers() {}

DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    emulator::Barrier& b = emulator::barrier_at(barrier);
    emulator::pieces_of(barrier, [](const emulator::Piece& piece) {
        memset(emulator::block.shared + piece.to, emulator::POISON, piece.bytes);
    });
    b.bytes += bytes;
    emulator::arrive(b);
}

DEVICE void barrier_arrive(uint32_t barrier, int rank) {
    if (rank < 0 || rank >= emulator::cluster.size) emulator::fail("no block %d in the cluster", rank);
    emulator::arrive(emulator::barrier_at(barrier));
}

DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
    emulator::Barrier& b = emulator::barrier_at(barrier);
    for (long tries = 0; b.phase % 2 == parity; ++tries) {
        if (b.pending) {
            if (tries > 1000000) emulator::fail("waits forever for a barrier");
            emulator::let_others();
            continue;
        }
        emulator::pieces_of(barrier, [&](const emulator::Piece& piece) {
            memcpy(emulator::block.shared + piece.to, piece.from, piece.bytes);
            b.bytes -= piece.bytes;
        });
        if (b.bytes && (emulator::cluster.size == 1 || emulator::cluster.again))
            emulator::fail("a barrier waits for %ld bytes more than are copied", b.bytes);
        b = {b.count, b.count, 0, b.phase + 1};
    }
}

DEVICE void copy_to_blocks(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                           uint16_t blocks) {
    if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || !bytes)
        emulator::fail("a bulk copy of %u bytes from %p to byte %u: not multiples of 16", bytes, from, to);
    if (to + bytes > uint32_t(emulator::block.shared_bytes))
        emulator::fail("a bulk copy to byte %u of %d bytes of shared memory", to + bytes,
                       emulator::block.shared_bytes);
    if (blocks >> emulator::cluster.size)
        emulator::fail("a copy to blocks %x of a cluster of %d", blocks, emulator::cluster.size);
    memset(emulator::block.shared + to, emulator::POISON, bytes);
    emulator::Cluster& c = emulator::cluster;
    if (!c.again)
        c.pieces[{emulator::block_at(blockIdx.x % c.size), barrier}].push_back(
            {to, bytes, static_cast<const char*>(from), emulator::barrier_at(barrier).phase, blocks});
}

DEVICE void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    copy_to_blocks(to, from, bytes, barrier, uint16_t(1 << blockIdx.x % emulator::cluster.size));
}

DEVICE int cluster_rank() { return blockIdx.x % emulator::cluster.size; }
DEVICE int cluster_size() { return emulator::cluster.size; }

DEVICE void cluster_barrier(emulator::Site site = BESA_SITE) {
    emulator::Cluster& c = emulator::cluster;
    const long here = emulator::block_at(cluster_rank());
    emulator::meet_block(site);
    if (c.block_now != here) c.block_now = here, c.passed = 0;
    if (c.passed++ % emulator::block.size == 0)  // the first one to go on: nothing has changed yet
        c.left[emulator::left_by(cluster_rank())].assign(
            emulator::block.shared, emulator::block.shared + emulator::block.shared_bytes);
}

DEVICE void cluster_barrier_after_reading(emulator::Site site = BESA_SITE) { cluster_barrier(site); }

DEVICE float4 load_of_block(uint32_t address, int rank) {
    const emulator::Cluster& c = emulator::cluster;
    if (rank < 0 || rank >= c.size) emulator::fail("block %d of a cluster of %d", rank, c.size);
    if (address % 16) emulator::fail("load_of_block of byte %u, not a multiple of 16", address);
    float4 v;
    memset(&v, emulator::POISON, sizeof v);
    const auto found = c.left.find(emulator::left_by(rank));
    if (found == c.left.end()) return v;  // in the first run
    if (address + 16 > found->second.size()) emulator::fail("load_of_block of byte %u", address);
    memcpy(&v, found->second.data() + address, 16);
    return v;
}
