// SPDX-License-Identifier: Apache-2.0
// A kernel in the place of a network: y = 2 x + 1, late enough that whoever forgets to wait reads what was there
// before.
#include <cuda_runtime_api.h>

#include <cstdint>

namespace {

__global__ void stand_in(const float* x, float* y, int64_t count, int64_t cycles) {
    const int64_t begun = clock64();
    while (clock64() - begun < cycles) {
    }
    const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
    if (i < count) y[i] = 2 * x[i] + 1;
}

}  // namespace

// Returns CUDA's error code.
extern "C" int32_t stand_in_launch(const float* x, float* y, int64_t count, int64_t cycles, void* stream) {
    stand_in<<<static_cast<unsigned>((count + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(x, y, count,
                                                                                                        cycles);
    return cudaGetLastError();
}
