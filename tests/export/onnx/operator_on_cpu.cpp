// besa's operator for NVIDIA GPUs as one of the CPU's provider, beside a driver that runs kernels
// there: DRIVER is that driver's path.

#include <onnxruntime_c_api.h>

#include "cuda_driver.h"
#include "ort_cuda.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(
    OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(17);
    besa::cuda::driver(DRIVER);
    static OrtCustomOpDomain* domain = nullptr;
    if (!domain) {
        if (OrtStatus* status = api->CreateCustomOpDomain("ai.besa", &domain)) return status;
        add_cuda_operators(api, domain, "CPUExecutionProvider");
    }
    return api->AddCustomOpDomain(options, domain);
}
