// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "upsample_argmax_variants.h"

namespace internimage {

// Enqueues UpsampleArgmax; see launch(). `dtype` is that of the logits.
cudaError_t launch_upsample_argmax(const UpsampleArgmaxParams& p, DType dtype, int32_t tactic, cudaStream_t stream);

}  // namespace internimage
