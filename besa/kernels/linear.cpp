// What Python calls: sparse products and experts on threads, and what this library was built with.

#include <string>

#include "abi.h"
#include "api.h"
#include "experts.h"
#include "isa.h"
#include "sparse_linear.h"
#include "threads.h"

namespace {

// All that both sides must agree on, in one line: abi.py makes the same.
std::string describe_abi() {
    std::string text = "version " + std::to_string(besa::kAbiVersion) + ", job of " +
                       std::to_string(sizeof(besa::Job)) + " bytes, experts of " +
                       std::to_string(sizeof(besa::Experts)) + ", instruction sets";
    for (const char* name : besa::kIsaNames) text += std::string(" ") + name;
    text += ", group sizes";
    for (const auto size : besa::kGroupSizes) text += " " + std::to_string(size);
    text += ", functions";
    for (const char* name : besa::kFunctionNames) text += std::string(" ") + name;
    return text;
}

}  // namespace

BESA_API const char* besa_abi() {
    static const std::string text = describe_abi();
    return text.c_str();
}

// Bit i says whether this CPU has instruction set i.
BESA_API int besa_isas() {
    int bits = 0;
    for (int isa = 0; isa < besa::kIsas; ++isa) bits |= besa::has_isa(isa) << isa;
    return bits;
}

BESA_API int besa_best_isa() { return besa::best_isa(); }

// Returns a besa::Status.
BESA_API int besa_sparse_linear(const besa::Job* job) {
    if (job->parallel) return besa::sparse_linear(*job);
    besa::Job own = *job;
    own.parallel = besa::on_threads;
    return besa::sparse_linear(own);
}

// Returns a besa::Status.
BESA_API int besa_sparse_experts(const besa::Experts* layer) {
    besa::Experts own = *layer;
    for (besa::Job* job : {&own.gate_up, &own.down})
        if (!job->parallel) job->parallel = besa::on_threads;
    return besa::sparse_experts(own);
}
