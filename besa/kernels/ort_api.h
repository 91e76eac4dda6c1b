// ONNX Runtime's C interface as C++ has it: failures as exceptions, tensors as values.

#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

namespace {

// The version of the interface that is asked for: the oldest in which a kernel can use the session's
// threads.
constexpr std::uint32_t kApiVersion = 17;

const OrtApi* api = nullptr;

// A failure of ONNX Runtime's, or one for it to report.
struct Refused {
    OrtStatus* status;
};

inline void check(OrtStatus* status) {
    if (status) throw Refused{status};
}

[[noreturn]] inline void refuse(const char* what) {
    throw Refused{api->CreateStatus(ORT_INVALID_GRAPH, what)};
}

// Runs body; exceptions end here, because the caller is C.
template <class F>
OrtStatus* guarded(const F& body) {
    try {
        body();
        return nullptr;
    } catch (const Refused& refused) {
        return refused.status;
    } catch (const std::bad_alloc&) {
        return api->CreateStatus(ORT_FAIL, "SparseMatMul: out of memory");
    } catch (const std::runtime_error& error) {
        return api->CreateStatus(ORT_FAIL, error.what());
    }
}

// Where a tensor lies; the session owns it.
struct Tensor {
    std::vector<std::int64_t> shape;
    std::int64_t count = 0;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    const void* data = nullptr;
};

inline Tensor read(const OrtValue* value) {
    Tensor tensor;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api->GetTensorTypeAndShape(value, &info));
    const auto release = [](OrtTensorTypeAndShapeInfo* p) {
        api->ReleaseTensorTypeAndShapeInfo(p);
    };
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owner(info, release);
    std::size_t rank = 0, count = 0;
    check(api->GetDimensionsCount(info, &rank));
    tensor.shape.resize(rank);
    check(api->GetDimensions(info, tensor.shape.data(), rank));
    check(api->GetTensorShapeElementCount(info, &count));
    check(api->GetTensorElementType(info, &tensor.type));
    tensor.count = static_cast<std::int64_t>(count);
    void* data = nullptr;
    check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    tensor.data = data;
    return tensor;
}

// An attribute of a node, or `otherwise` if it has none of that name.
inline std::int64_t attribute(const OrtKernelInfo* info, const char* name, std::int64_t otherwise) {
    std::int64_t value = 0;
    OrtStatus* status = api->KernelInfoGetAttribute_int64(info, name, &value);
    if (!status) return value;
    api->ReleaseStatus(status);
    return otherwise;
}

// A node's input that is an initializer; without data if it is none, or is left out.
inline Tensor constant(const OrtKernelInfo* info, int index) {
    std::size_t inputs = 0;
    check(api->KernelInfo_GetInputCount(info, &inputs));
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (static_cast<std::size_t>(index) < inputs)
        check(api->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
    return is_constant && value ? read(value) : Tensor{};
}

// A node's input, without data if it is left out.
inline Tensor input(const OrtKernelContext* context, int index) {
    std::size_t inputs = 0;
    check(api->KernelContext_GetInputCount(context, &inputs));
    const OrtValue* value = nullptr;
    if (static_cast<std::size_t>(index) < inputs)
        check(api->KernelContext_GetInput(context, index, &value));
    return value ? read(value) : Tensor{};
}

// Memory for Y, of X's shape with another last dimension.
inline void* output(OrtKernelContext* context, std::vector<std::int64_t> shape, std::int64_t last) {
    shape.back() = last;
    OrtValue* value = nullptr;
    void* data = nullptr;
    check(api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value));
    check(api->GetTensorMutableData(value, &data));
    return data;
}

// `ai.besa::SparseMatMul` for one provider and one choice of types: X, the weight and where it has
// values are followed by what not all kernels need. ONNX Runtime wants an operator's kernels to
// agree on how many inputs there are, and which may be left out.
//
// An Operator has input_type(index) and input_memory(index).
template <class Operator, class Kernel>
struct SparseMatMul : OrtCustomOp {
    const char* provider;

    explicit SparseMatMul(const char* provider_) : OrtCustomOp{}, provider(provider_) {
        version = kApiVersion;
        GetName = [](const OrtCustomOp*) { return "SparseMatMul"; };
        GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider; };
        GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return 5; };
        GetInputType = [](const OrtCustomOp* op, std::size_t i) { return self(op).input_type(i); };
        GetInputCharacteristic = [](const OrtCustomOp*, std::size_t i) {
            return i < 2 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
        };
        GetInputMemoryType = [](const OrtCustomOp*, std::size_t i) {
            return Operator::input_memory(i);
        };
        GetOutputTypeCount = [](const OrtCustomOp*) -> std::size_t { return 1; };
        GetOutputType = [](const OrtCustomOp* op, std::size_t) { return self(op).input_type(0); };
        GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) {
            return INPUT_OUTPUT_REQUIRED;
        };
        GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
        GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return 1; };
        CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info,
                            void** kernel) -> OrtStatusPtr {
            return guarded([&] { *kernel = new Kernel(info); });
        };
        KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatusPtr {
            return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
        };
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    }

   private:
    static const Operator& self(const OrtCustomOp* op) {
        return *static_cast<const Operator*>(op);
    }
};

}  // namespace
