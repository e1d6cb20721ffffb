// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "dcnv3_variants.h"

namespace internimage {

// Enqueues DCNv3; see launch().
cudaError_t launch_dcnv3(const Dcnv3Params& p, DType dtype, int32_t tactic, cudaStream_t stream);

}  // namespace internimage
