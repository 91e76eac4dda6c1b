// ONNX Runtime's C interface as C++ has it: failures as exceptions, tensors as values.

#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <memory>
#include <new>
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

}  // namespace
