// SPDX-License-Identifier: Apache-2.0
// Running MSDeformAttn on a stream. Knows CUDA, not TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include "ms_deform_attn_variants.h"

namespace internimage {

// Enqueues MSDeformAttn on `stream`. `tactic` is 0 for the default or 1..kTactics. Pointers are device addresses.
// Returns cudaErrorInvalidValue when parameter_error() objects, else what the launch returned.
cudaError_t launch_ms_deform_attn(const MsDeformAttnParams& p, DType dtype, int32_t tactic, cudaStream_t stream);

// launch_ms_deform_attn for one storage type; one translation unit each, so that they compile in parallel.
template <typename T>
cudaError_t launch_variant(const MsDeformAttnParams& p, const MsDeformAttnChoice& choice, const Grid& grid,
                           cudaStream_t stream);
template <>
cudaError_t launch_variant<float>(const MsDeformAttnParams&, const MsDeformAttnChoice&, const Grid&, cudaStream_t);
template <>
cudaError_t launch_variant<Half>(const MsDeformAttnParams&, const MsDeformAttnChoice&, const Grid&, cudaStream_t);
template <>
cudaError_t launch_variant<BFloat16>(const MsDeformAttnParams&, const MsDeformAttnChoice&, const Grid&, cudaStream_t);

}  // namespace internimage
