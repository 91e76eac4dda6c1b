// `ai.besa::SparseMatMul` for ONNX Runtime's CUDA provider:
//
//     Y [..., out] = SparseMatMul <in_features, out_features, group_size, capacity>
//                    (X [..., in], records, offsets, scale, code)
//
//     X        float16 or bfloat16; Y is of its type
//     records  uint8: W [out, in] as cuda/records.cuh describes it; in is a multiple of 64
//     offsets  int32: where each record begins; left out for 2:4
//     scale    float [out, groups] for int8 values, which multiply X as it is; left out for others
//     code     uint8: machine code (cuda_code.h), in the CPU's memory and shared by all nodes
//     group_size  columns that share a scale; 0 for a whole row
//     capacity    bytes of the largest record
//
// All inputs but X are initializers. The kernels are those of besa.kernels.cuda, compiled when the
// model was exported, and launched through the CUDA driver on the session's stream: no CUDA toolkit
// is needed, neither to build this nor to run it.

#include "ort_cuda.h"

#include <vector>

#include "cuda_product.h"
#include "ort_api.h"

namespace {

using besa::cuda::Operands;
using besa::cuda::Product;
using besa::cuda::Weight;

constexpr int kX = 0, kRecords = 1, kOffsets = 2, kScale = 3, kCode = 4;

// One node of a session.
class Kernel {
   public:
    explicit Kernel(const OrtKernelInfo* info) : weight_(weight_of(info)), product_(weight_) {}

    void compute(OrtKernelContext* context) const {
        const Tensor x = input(context, kX), code = input(context, kCode);
        if (x.shape.empty() || x.shape.back() != weight_.cols)
            refuse("SparseMatMul: X does not have in_features columns");
        Operands operands{};
        operands.records = input(context, kRecords).data;
        operands.offsets = input(context, kOffsets).data;
        operands.scale = input(context, kScale).data;
        operands.x = x.data;
        operands.y = output(context, x.shape, weight_.rows);
        void* stream = nullptr;
        check(api->KernelContext_GetGPUComputeStream(context, &stream));
        product_.run(code.data, code.count, operands, x.count / weight_.cols, stream);
    }

   private:
    static Weight weight_of(const OrtKernelInfo* info) {
        const Tensor records = constant(info, kRecords);
        if (!records.data || !constant(info, kCode).data)
            refuse("SparseMatMul: records and code have to be initializers");
        Weight weight{};
        weight.rows = attribute(info, "out_features", 0);
        weight.cols = attribute(info, "in_features", 0);
        weight.capacity = attribute(info, "capacity", 0);
        weight.group_size = attribute(info, "group_size", 0);
        weight.type = type_of_x(info);
        weight.record_bytes = records.count;
        weight.offsets = constant(info, kOffsets).count;
        weight.scales = constant(info, kScale).count;
        return weight;
    }

    static besa::cuda::Type type_of_x(const OrtKernelInfo* info) {
        OrtTypeInfo* made = nullptr;
        check(api->KernelInfo_GetInputTypeInfo(info, kX, &made));
        const auto release = [](OrtTypeInfo* p) { api->ReleaseTypeInfo(p); };
        const std::unique_ptr<OrtTypeInfo, decltype(release)> owner(made, release);
        const OrtTensorTypeAndShapeInfo* shape = nullptr;
        ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        check(api->CastTypeInfoToTensorInfo(made, &shape));
        check(api->GetTensorElementType(shape, &type));
        return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? besa::cuda::kTypeFp16
                                                             : besa::cuda::kTypeBf16;
    }

    Weight weight_;
    Product product_;
};

// The operator for one type of X.
struct Operator : SparseMatMul<Operator, Kernel> {
    ONNXTensorElementDataType x;

    Operator(const char* provider_, ONNXTensorElementDataType x_)
        : SparseMatMul(provider_), x(x_) {}

    ONNXTensorElementDataType input_type(std::size_t index) const {
        switch (index) {
            case kX: return x;
            case kOffsets: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
            case kScale: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
            default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        }
    }

    static OrtMemType input_memory(std::size_t index) {
        return index == kCode ? OrtMemTypeCPUInput : OrtMemTypeDefault;
    }
};

}  // namespace

void add_cuda_operators(const OrtApi* runtime, OrtCustomOpDomain* domain, const char* provider) {
    api = runtime;
    // They live as long as the library: sessions keep their addresses.
    static const std::vector<Operator> all{{provider, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
                                           {provider, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}};
    for (const Operator& op : all) check(api->CustomOpDomain_Add(domain, &op));
}
