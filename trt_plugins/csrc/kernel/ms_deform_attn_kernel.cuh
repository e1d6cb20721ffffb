// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ms_deform_attn_launch.h"
#include "ms_deform_attn_math.h"

namespace internimage {

template <typename V>
__global__ void __launch_bounds__(kMaxThreads) ms_deform_attn_kernel(const MsDeformAttnParams p, const Grid grid) {
    run_thread<V>(p, grid, blockIdx.x, threadIdx.x, threadIdx.y, threadIdx.z);
}

template <typename V>
cudaError_t launch(const MsDeformAttnParams& p, const Grid& g, cudaStream_t stream) {
    const dim3 threads(g.block_x, g.block_y, g.block_z);
    ms_deform_attn_kernel<V><<<dim3(static_cast<uint32_t>(g.blocks)), threads, 0, stream>>>(p, g);
    return cudaGetLastError();
}

template <typename V>
bool matches(const MsDeformAttnChoice& choice) {
    return choice.width == V::kWidth && choice.vectors == V::kVectors && choice.points == V::kPoints;
}

}  // namespace internimage

// Defines launch_variant<T>; the last line is reached only if choose_variant() names a kernel nobody compiled.
#define MS_DEFORM_ATTN_DEFINE_LAUNCH(VARIANTS, T)                                                             \
    template <>                                                                                               \
    cudaError_t internimage::launch_variant<T>(const MsDeformAttnParams& p, const MsDeformAttnChoice& choice, \
                                               const Grid& grid, cudaStream_t stream) {                       \
        VARIANTS(MS_DEFORM_ATTN_LAUNCH_IF_CHOSEN, T)                                                          \
        return cudaErrorInvalidDeviceFunction;                                                                \
    }
#define MS_DEFORM_ATTN_LAUNCH_IF_CHOSEN(T, width, vectors, points)                      \
    if (matches<MsDeformAttnVariant<T, width, vectors, points>>(choice)) {              \
        return launch<MsDeformAttnVariant<T, width, vectors, points>>(p, grid, stream); \
    }
