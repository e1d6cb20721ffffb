// SPDX-License-Identifier: Apache-2.0
#include "ms_deform_attn_launch.h"

#include "device.h"

namespace internimage {

cudaError_t launch_ms_deform_attn(const MsDeformAttnParams& p, DType dtype, int32_t tactic, cudaStream_t stream) {
    if (parameter_error(p, dtype) != nullptr) return cudaErrorInvalidValue;
    LaunchConfig config{};
    const cudaError_t status = find_config(tactic, output_bytes(p, dtype), config);
    if (status != cudaSuccess) return status;
    const MsDeformAttnChoice choice = choose_variant(p, dtype, config.vectors);
    const Grid grid = make_grid(p, choice, config);
    if (grid.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    switch (dtype) {
        case DType::kFloat32:
            return launch_variant<float>(p, choice, grid, stream);
        case DType::kFloat16:
            return launch_variant<Half>(p, choice, grid, stream);
        default:
            return launch_variant<BFloat16>(p, choice, grid, stream);
    }
}

}  // namespace internimage
