// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "dcnv3_launch.h"
#include "dcnv3_math.h"

namespace internimage {

template <typename V>
__global__ void __launch_bounds__(kMaxThreads) dcnv3_kernel(const Dcnv3Params p, const Geometry geometry) {
    run_thread<V>(p, geometry, blockIdx.x, threadIdx.x, threadIdx.y, threadIdx.z);
}

template <typename V>
cudaError_t launch(const Dcnv3Params& p, const Geometry& g, cudaStream_t stream) {
    const dim3 threads(g.grid.block_x, g.grid.block_y, g.grid.block_z);
    dcnv3_kernel<V><<<dim3(static_cast<uint32_t>(g.grid.blocks)), threads, 0, stream>>>(p, g);
    return cudaGetLastError();
}

template <typename V>
bool matches(const Choice& choice) {
    return choice.width == V::kWidth && choice.vectors == V::kVectors && choice.group == V::kGroupChannels &&
           choice.softmax == V::kSoftmax;
}

}  // namespace internimage

// Defines launch_variant<T>; the last line is reached only if choose_variant() names a kernel nobody compiled.
#define DCNV3_DEFINE_LAUNCH(VARIANTS, T)                                                                      \
    template <>                                                                                               \
    cudaError_t internimage::launch_variant<T>(const Dcnv3Params& p, const Choice& choice, const Geometry& g, \
                                               cudaStream_t stream) {                                         \
        VARIANTS(DCNV3_LAUNCH_IF_CHOSEN, T)                                                                   \
        return cudaErrorInvalidDeviceFunction;                                                                \
    }
#define DCNV3_LAUNCH_IF_CHOSEN(T, width, vectors, group, softmax)                \
    if (matches<Variant<T, width, vectors, group, softmax>>(choice)) {           \
        return launch<Variant<T, width, vectors, group, softmax>>(p, g, stream); \
    }
