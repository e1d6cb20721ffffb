// SPDX-License-Identifier: Apache-2.0
// From an operator's parameters to a kernel on a stream, for every operator. Knows CUDA, not TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include "variants.h"

namespace internimage {

// The configuration of `tactic` (1..kTactics), or for 0 the default one on the current device. Returns
// cudaErrorInvalidValue for another tactic, else what CUDA said.
cudaError_t find_config(int32_t tactic, int64_t output_bytes, LaunchConfig& config);

// Enqueues the kernel of `choice` for storage type T; kernel.cuh defines it.
template <typename T, typename Params, typename Choice, typename Geometry>
cudaError_t launch_variant(const Params& p, const Choice& choice, const Geometry& geometry, cudaStream_t stream);

// Enqueues an operator on `stream`. `tactic` is 0 for the default or 1..kTactics. Pointers are device addresses.
// Returns cudaErrorInvalidValue when parameter_error() objects, else what the launch returned.
template <typename Params>
cudaError_t launch(const Params& p, DType dtype, int32_t tactic, cudaStream_t stream) {
    if (parameter_error(p, dtype) != nullptr) return cudaErrorInvalidValue;
    LaunchConfig config{};
    const cudaError_t status = find_config(tactic, output_bytes(p, dtype), config);
    if (status != cudaSuccess) return status;
    const auto choice = choose_variant(p, dtype, config);
    const auto geometry = make_geometry(p, choice, config);
    if (grid_of(geometry).blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
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
