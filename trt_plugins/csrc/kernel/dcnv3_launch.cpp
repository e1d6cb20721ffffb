// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_launch.h"

#include "device.h"

namespace internimage {

cudaError_t launch_dcnv3(const Dcnv3Params& p, DType dtype, int32_t tactic, cudaStream_t stream) {
    if (parameter_error(p, dtype) != nullptr) return cudaErrorInvalidValue;
    LaunchConfig config{};
    const cudaError_t status = find_config(tactic, output_bytes(p, dtype), config);
    if (status != cudaSuccess) return status;
    const Choice choice = choose_variant(p, dtype, config.vectors);
    const Geometry geometry = make_geometry(p, choice, config);
    if (geometry.grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
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
