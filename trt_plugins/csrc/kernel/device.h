// SPDX-License-Identifier: Apache-2.0
// What a launch asks of the GPU. Knows CUDA, not TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include "grid.h"

namespace internimage {

// The configuration of `tactic` (1..kTactics), or for 0 the default one on the current device. Returns
// cudaErrorInvalidValue for another tactic, else what CUDA said.
cudaError_t find_config(int32_t tactic, int64_t output_bytes, LaunchConfig& config);

}  // namespace internimage
