// SPDX-License-Identifier: Apache-2.0
// InternImage's own DCNv3 kernel through a C function: the launch alone, into memory of the caller.
#include "cuda/dcnv3_im2col_cuda.cuh"

namespace {

template <typename T>
void launch(const void* input, const void* offset, const void* mask, void* output, const int* s, float scale,
            cudaStream_t stream) {
    dcnv3_im2col_cuda<T>(stream, static_cast<const T*>(input), static_cast<const T*>(offset),
                         static_cast<const T*>(mask), static_cast<T*>(output), 3, 3, 1, 1, 1, 1, 1, 1, s[3], s[4], s[0],
                         s[1], s[2], s[1], s[2], scale);
}

}  // namespace

// 3x3, stride 1, pad 1. `s`: batch, height, width, groups, channels of a group. Returns CUDA's error code.
extern "C" int official_launch(const void* input, const void* offset, const void* mask, void* output, const int* s,
                               float offset_scale, int half, void* stream) {
    const auto run = half ? launch<at::Half> : launch<float>;
    run(input, offset, mask, output, s, offset_scale, static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
}
