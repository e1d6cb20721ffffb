// SPDX-License-Identifier: Apache-2.0
// The kernels: each thread calls its operator's run_thread(). A file per operator and storage type instantiates
// launch_variant(), so that they compile in parallel.
#pragma once

#include "launch.h"

namespace internimage {

template <typename V, typename Params, typename Geometry>
__global__ void __launch_bounds__(kMaxThreads) kernel(const Params p, const Geometry geometry) {
    run_thread(V{}, p, geometry, blockIdx.x, threadIdx.x, threadIdx.y, threadIdx.z);
}

template <typename T, typename Params, typename Choice, typename Geometry>
cudaError_t launch_variant(const Params& p, const Choice& choice, const Geometry& geometry, cudaStream_t stream) {
    const Grid& g = grid_of(geometry);
    const bool found = VariantsOf<Params, T>::List::find([&](auto variant) {
        using V = decltype(variant);
        if (!(V::choice() == choice)) return false;
        const dim3 threads(g.block_x, g.block_y, g.block_z);
        kernel<V><<<dim3(static_cast<uint32_t>(g.blocks)), threads, 0, stream>>>(p, geometry);
        return true;
    });
    // Not found: choose_variant() named a kernel that nobody compiled.
    return found ? cudaGetLastError() : cudaErrorInvalidDeviceFunction;
}

}  // namespace internimage
