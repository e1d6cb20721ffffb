// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

namespace internimage {

cudaError_t find_config(int32_t tactic, int64_t output_bytes, LaunchConfig& config) {
    if (tactic < 0 || tactic > kTactics) return cudaErrorInvalidValue;
    if (tactic > 0) {
        config = kLaunchConfigs[tactic - 1];
        return cudaSuccess;
    }
    int device = 0;
    int multiprocessors = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) {
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (status == cudaSuccess) config = default_config(output_bytes, multiprocessors);
    return status;
}

}  // namespace internimage
