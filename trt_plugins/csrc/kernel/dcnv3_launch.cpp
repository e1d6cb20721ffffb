// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_launch.h"

namespace internimage {

cudaError_t launch_dcnv3(const Dcnv3Params& p, DType dtype, int32_t tactic, cudaStream_t stream) {
    if (tactic < 0 || tactic > kTactics || parameter_error(p, dtype) != nullptr) return cudaErrorInvalidValue;
    LaunchConfig config;
    if (tactic > 0) {
        config = kLaunchConfigs[tactic - 1];
    } else {
        int device = 0;
        int multiprocessors = 0;
        cudaError_t status = cudaGetDevice(&device);
        if (status == cudaSuccess) {
            status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        }
        if (status != cudaSuccess) return status;
        config = default_config(p, dtype, multiprocessors);
    }
    const Choice choice = choose_variant(p, dtype, config.vectors);
    const Geometry geometry = make_geometry(p, choice, config);
    if (geometry.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    switch (dtype) {
        case DType::kFloat32:
            return launch_variant<float>(p, choice, geometry, stream);
        case DType::kFloat16:
            return launch_variant<Half>(p, choice, geometry, stream);
        default:
            return launch_variant<BFloat16>(p, choice, geometry, stream);
    }
}

}  // namespace internimage
