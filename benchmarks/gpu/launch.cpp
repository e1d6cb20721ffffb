// SPDX-License-Identifier: Apache-2.0
// The plugins' launches through a C interface, for the benchmark and for tests on a GPU.
#include "kernel/dcnv3_launch.h"
#include "kernel/ms_deform_attn_launch.h"
#include "kernel/upsample_argmax_launch.h"

extern "C" __attribute__((visibility("default"))) int32_t dcnv3_launch(const internimage::Dcnv3Params* p, int32_t dtype,
                                                                       int32_t tactic, void* stream) {
    return internimage::launch_dcnv3(*p, static_cast<internimage::DType>(dtype), tactic,
                                     static_cast<cudaStream_t>(stream));
}

extern "C" __attribute__((visibility("default"))) int32_t
ms_deform_attn_launch(const internimage::MsDeformAttnParams* p, int32_t dtype, int32_t tactic, void* stream) {
    return internimage::launch_ms_deform_attn(*p, static_cast<internimage::DType>(dtype), tactic,
                                              static_cast<cudaStream_t>(stream));
}

extern "C" __attribute__((visibility("default"))) int32_t
upsample_argmax_launch(const internimage::UpsampleArgmaxParams* p, int32_t dtype, int32_t tactic, void* stream) {
    return internimage::launch_upsample_argmax(*p, static_cast<internimage::DType>(dtype), tactic,
                                               static_cast<cudaStream_t>(stream));
}

extern "C" __attribute__((visibility("default"))) int32_t dcnv3_tactics() { return internimage::kTactics; }
