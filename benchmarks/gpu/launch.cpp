// SPDX-License-Identifier: Apache-2.0
// The plugin's launch through a C interface, for the benchmark.
#include "kernel/dcnv3_launch.h"

extern "C" __attribute__((visibility("default"))) int32_t dcnv3_launch(const internimage::Dcnv3Params* p, int32_t dtype,
                                                                       int32_t tactic, void* stream) {
    return internimage::launch_dcnv3(*p, static_cast<internimage::DType>(dtype), tactic,
                                     static_cast<cudaStream_t>(stream));
}

extern "C" __attribute__((visibility("default"))) int32_t dcnv3_tactics() { return internimage::kTactics; }
