// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "ms_deform_attn_variants.h"

namespace internimage {

// Enqueues MSDeformAttn; see launch().
cudaError_t launch_ms_deform_attn(const MsDeformAttnParams& p, DType dtype, int32_t tactic, cudaStream_t stream);

}  // namespace internimage
