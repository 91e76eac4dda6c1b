// The packed product as an operator of ONNX Runtime, `ai.besa::SparseMatMul`: a library of its own,
// libbesa_ort.so, which sessions load by its path.
//
//     Y [..., out] = SparseMatMul <in_features, group_size> (X [..., in], values, bitmask, scale, steps)
//
//     X        float, float16 or bfloat16; Y is of its type
//     values   the nonzeros of W [out, in], row by row: float, float16, bfloat16, int8, or int4, two
//              in a byte of uint8 (nibbles.h)
//     bitmask  uint8 [out, ceil(in / 8)], little-endian bits
//     scale    float [out, groups] for int8 values, [out, 1] for int4; both multiply X quantized to int8
//              per token
//     steps    uint8 [out, groups] for int4 values (nibbles.h)
//     group_size  columns that share a scale, or for int4 a step; 0 for a whole row
//
// On GPUs the fifth input is another one (ort_cuda.cpp).
//
// values, bitmask and scale are initializers: ONNX Runtime maps them from their file, and they are
// read where they lie. All that is made of them at load is the index of each row's first value. The
// kernels are those of torch's operator; the threads are the session's own.
//
// The kernels are linked into this library once more, without OpenMP: it needs neither torch nor any
// other runtime beside it. ort_cuda.cpp has the operator's kernel for NVIDIA GPUs.

#include "ort_api.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "abi.h"
#include "api.h"
#include "isa.h"
#include "nibbles.h"
#include "ort_cuda.h"
#include "packing.h"
#include "sparse_linear.h"

namespace {

constexpr int kX = 0, kValues = 1, kBitmask = 2, kScale = 3, kSteps = 4;

int cpus() {
#ifdef __linux__
    cpu_set_t set;  // those that this process may run on
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned all = std::thread::hardware_concurrency();
    return all ? static_cast<int>(all) : 1;
}

// As besa.kernels.isa: the best, or what BESA_ISA names.
int chosen_isa() {
    const char* wanted = std::getenv("BESA_ISA");
    if (!wanted || !*wanted) return besa::best_isa();
    for (int isa = 0; isa < besa::kIsas; ++isa)
        if (std::strcmp(wanted, besa::kIsaNames[isa]) == 0 && besa::has_isa(isa)) return isa;
    refuse("BESA_ISA names no instruction set that this CPU has");
}

bool is_group_size(std::int64_t size) {
    for (const std::int64_t known : besa::kGroupSizes)
        if (size == known) return true;
    return size == 0;  // one scale a row
}

int dtype_of(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return besa::kBf16;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return besa::kFp16;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return besa::kFp32;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return besa::kInt4;
        default: return besa::kInt8;
    }
}

bool is_whole(ONNXTensorElementDataType type) {
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
}

// One node of a session.
class Kernel {
   public:
    explicit Kernel(const OrtKernelInfo* info)
        : in_features_(attribute(info, "in_features", 0)),
          group_size_(attribute(info, "group_size", 0)),
          isa_(chosen_isa()),
          cpus_(cpus()) {
        const Tensor values = constant(info, kValues);
        const Tensor bitmask = constant(info, kBitmask);
        const Tensor scale = constant(info, kScale), steps = constant(info, kSteps);
        if (!values.data || !bitmask.data)
            refuse("SparseMatMul: values and bitmask have to be initializers");
        const std::int64_t width = (in_features_ + 7) / 8;
        if (in_features_ < 1 || bitmask.shape.size() != 2 || bitmask.shape[1] != width ||
            bitmask.count == 0)
            refuse("SparseMatMul: bitmask does not fit in_features");
        out_features_ = bitmask.shape[0];
        index(values, bitmask, width);
        if (is_whole(values.type) != (scale.data != nullptr))
            refuse("SparseMatMul: scale goes with int8 and int4 values, and with them only");
        if (!is_group_size(group_size_))
            refuse("SparseMatMul: group_size is neither 0 nor one that the kernels know");
        const std::int64_t groups =
            group_size_ ? (in_features_ + group_size_ - 1) / group_size_ : 1;
        const bool int4 = dtype_of(values.type) == besa::kInt4;
        if (int4 != (steps.data != nullptr))
            refuse("SparseMatMul: steps go with int4 values, and with them only");
        const std::vector<std::int64_t> grouped{out_features_, groups}, by_row{out_features_, 1};
        if ((scale.data && scale.shape != (int4 ? by_row : grouped)) ||
            (int4 && steps.shape != grouped))
            refuse("SparseMatMul: scale or steps do not fit out_features and group_size");
        if (groups == 1) group_size_ = 0;
    }

    void compute(OrtKernelContext* context) const {
        const Tensor x = input(context, kX), values = input(context, kValues);
        const Tensor bitmask = input(context, kBitmask), scale = input(context, kScale);
        const Tensor steps = input(context, kSteps);
        if (x.shape.empty() || x.shape.back() != in_features_)
            refuse("SparseMatMul: X does not have in_features columns");
        void* y = output(context, x.shape, out_features_);

        besa::Job job{};
        job.values = values.data;
        job.bitmask = static_cast<const std::uint8_t*>(bitmask.data);
        job.row_ptr = row_ptr_.data();
        job.scale = static_cast<const float*>(scale.data);
        job.steps = static_cast<const std::uint8_t*>(steps.data);
        job.input = x.data;
        job.output = y;
        job.n_values = values.count;
        job.tokens = x.count / in_features_;
        job.rows = out_features_;
        job.cols = in_features_;
        (job.steps ? job.step_size : job.group_size) = group_size_;
        job.values_dtype = dtype_of(values.type);
        job.input_dtype = dtype_of(x.type);
        job.int8_input = is_whole(values.type);
        job.isa = isa_;
        job.threads = cpus_;
        job.parallel = in_session;
        job.pool = context;
        switch (besa::sparse_linear(job)) {
            case besa::kOk: return;
            case besa::kNoMemory: throw std::bad_alloc();
            default: refuse("SparseMatMul: values and bitmask disagree: the file is damaged");
        }
    }

   private:
    void index(const Tensor& values, const Tensor& bitmask, std::int64_t width) {
        const auto* bits = static_cast<const std::uint8_t*>(bitmask.data);
        row_ptr_.resize(out_features_ + 1);
        if (dtype_of(values.type) == besa::kInt4)
            point_to_nibbles(bits, width);
        else
            besa_row_pointers(bits, row_ptr_.data(), out_features_, width, 1, isa_);
        bool stray = false;
        if (in_features_ % 8)
            for (std::int64_t r = 0; r < out_features_; ++r)
                stray |= (bits[(r + 1) * width - 1] >> in_features_ % 8) != 0;
        if (stray || row_ptr_.back() != values.count)
            refuse("SparseMatMul: values and bitmask disagree: the file is damaged");
    }

    // Rows of int4 values: as many bytes as the more numerous kind of nibbles has values.
    void point_to_nibbles(const std::uint8_t* bits, std::int64_t width) {
        constexpr std::int64_t step = besa::kNibbleColumns / 8;
        for (std::int64_t r = 0; r < out_features_; ++r, bits += width) {
            std::int64_t count[2] = {0, 0};
            for (std::int64_t i = 0; i < width; ++i)
                count[i / step % 2] += __builtin_popcount(bits[i]);
            row_ptr_[r + 1] = row_ptr_[r] + std::max(count[0], count[1]);
        }
    }

    // Has the session's threads, the calling one among them, run the lanes.
    static void in_session(void* context, int lanes, void (*lane)(void*), void* task) {
        struct Call {
            void (*lane)(void*);
            void* task;
        } call{lane, task};
        const auto run = [](void* what, std::size_t) {
            const auto* one = static_cast<const Call*>(what);
            one->lane(one->task);
        };
        OrtStatus* status = api->KernelContext_ParallelFor(
            static_cast<const OrtKernelContext*>(context), run, lanes, 0, &call);
        if (!status) return;
        api->ReleaseStatus(status);
        lane(task);  // one lane does all of the work
    }

    std::int64_t in_features_, group_size_, out_features_ = 0;
    int isa_, cpus_;
    std::vector<std::int64_t> row_ptr_;
};

// The operator for one type of X and one of values.
struct Operator : SparseMatMul<Operator, Kernel> {
    ONNXTensorElementDataType x, values;

    Operator(ONNXTensorElementDataType x_, ONNXTensorElementDataType values_)
        : SparseMatMul(nullptr), x(x_), values(values_) {}

    ONNXTensorElementDataType input_type(std::size_t index) const {
        switch (index) {
            case kX: return x;
            case kValues: return values;
            case kScale: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
            default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        }
    }

    static OrtMemType input_memory(std::size_t) { return OrtMemTypeDefault; }
};

// They live as long as the library: sessions keep their addresses.
const std::vector<Operator>& operators() {
    static const std::vector<Operator> all = [] {
        std::vector<Operator> made;
        for (const auto x : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                             ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                             ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16})
            for (const auto values :
                 {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
                  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8})
                made.emplace_back(x, values);
        return made;
    }();
    return all;
}

OrtCustomOpDomain* domain() {
    static OrtCustomOpDomain* const made = [] {
        OrtCustomOpDomain* fresh = nullptr;
        check(api->CreateCustomOpDomain("ai.besa", &fresh));
        for (const Operator& op : operators()) check(api->CustomOpDomain_Add(fresh, &op));
        add_cuda_operators(api, fresh, "CUDAExecutionProvider");
        return fresh;
    }();
    return made;
}

}  // namespace

// What a session calls when it loads the library.
BESA_API OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* found = base->GetApi(kApiVersion);
    if (!found) {
        char words[160];
        std::snprintf(words, sizeof(words),
                      "besa's operator needs ONNX Runtime 1.%u or newer, and this is %s",
                      kApiVersion, base->GetVersionString());
        return base->GetApi(1)->CreateStatus(ORT_FAIL, words);
    }
    api = found;
    return guarded([&] { check(api->AddCustomOpDomain(options, domain())); });
}
