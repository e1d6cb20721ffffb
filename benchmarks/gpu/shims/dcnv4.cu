// SPDX-License-Identifier: Apache-2.0
// DCNv4's kernel through a C function: the launch alone, into memory of the caller.
#include <stdexcept>

#include "cuda/dcnv4_im2col_cuda.cuh"

namespace {

template <typename T>
void launch(const void* input, const void* offset_mask, void* output, const int* s, float scale, cudaStream_t stream) {
    dcnv4_im2col_cuda<T>(stream, static_cast<const T*>(input), static_cast<const T*>(offset_mask),
                         static_cast<T*>(output), 3, 3, 1, 1, 1, 1, 1, 1, s[3], s[4], s[0], s[1], s[2], s[1], s[2],
                         scale, 0, s[5], s[6], false, s[7]);
}

}  // namespace

// 3x3, stride 1, pad 1. `s`: batch, height, width, groups, channels of a group, channels of a thread, threads of a
// block, depth of `offset_mask`. Returns CUDA's error code, or -1 where the kernel refuses the settings.
extern "C" int dcnv4_launch(const void* input, const void* offset_mask, void* output, const int* s, float offset_scale,
                            int half, void* stream) {
    const auto run = half ? launch<at::Half> : launch<float>;
    try {
        run(input, offset_mask, output, s, offset_scale, static_cast<cudaStream_t>(stream));
    } catch (const std::exception&) {
        cudaGetLastError();
        return -1;
    }
    return cudaGetLastError();
}
