// SPDX-License-Identifier: Apache-2.0
// The plugins' launches, and the little of CUDA's memory that running them takes, through a C interface: for benchmarks
// and tests on a GPU without TensorRT. Functions of CUDA return its error code.
#include <cuda_runtime_api.h>

#include "kernel/dcnv3_launch.h"
#include "kernel/ms_deform_attn_launch.h"
#include "kernel/upsample_argmax_launch.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#define EXPORT_LAUNCH(NAME, PARAMS)                                                                           \
    EXPORT int32_t NAME##_launch(const internimage::PARAMS* p, int32_t dtype, int32_t tactic, void* stream) { \
        return internimage::launch_##NAME(*p, static_cast<internimage::DType>(dtype), tactic,                 \
                                          static_cast<cudaStream_t>(stream));                                 \
    }

EXPORT_LAUNCH(dcnv3, Dcnv3Params)
EXPORT_LAUNCH(ms_deform_attn, MsDeformAttnParams)
EXPORT_LAUNCH(upsample_argmax, UpsampleArgmaxParams)

EXPORT int32_t dcnv3_tactics() { return internimage::kTactics; }

EXPORT void* device_alloc(int64_t bytes) {
    void* address = nullptr;
    return cudaMalloc(&address, static_cast<size_t>(bytes)) == cudaSuccess ? address : nullptr;
}

EXPORT int32_t device_free(void* address) { return cudaFree(address); }

EXPORT int32_t device_upload(void* device, const void* host, int64_t bytes) {
    return cudaMemcpy(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice);
}

EXPORT int32_t device_download(void* host, const void* device, int64_t bytes) {
    return cudaMemcpy(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost);
}

EXPORT int32_t device_synchronize() { return cudaDeviceSynchronize(); }
