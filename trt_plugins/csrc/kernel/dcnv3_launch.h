// SPDX-License-Identifier: Apache-2.0
// Running DCNv3 on a stream. Knows CUDA, not TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include "dcnv3_variants.h"

namespace internimage {

// Enqueues DCNv3 on `stream`. `tactic` is 0 for the default or 1..kTactics. Pointers are device addresses. Returns
// cudaErrorInvalidValue when parameter_error() objects, else what the launch returned.
cudaError_t launch_dcnv3(const Dcnv3Params& p, DType dtype, int32_t tactic, cudaStream_t stream);

// launch_dcnv3 for one storage type; one translation unit each, so that they compile in parallel.
template <typename T>
cudaError_t launch_variant(const Dcnv3Params& p, const Choice& choice, const Geometry& geometry, cudaStream_t stream);
template <>
cudaError_t launch_variant<float>(const Dcnv3Params&, const Choice&, const Geometry&, cudaStream_t);
template <>
cudaError_t launch_variant<Half>(const Dcnv3Params&, const Choice&, const Geometry&, cudaStream_t);
template <>
cudaError_t launch_variant<BFloat16>(const Dcnv3Params&, const Choice&, const Geometry&, cudaStream_t);

}  // namespace internimage
