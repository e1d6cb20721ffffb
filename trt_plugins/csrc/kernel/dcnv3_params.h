// SPDX-License-Identifier: Apache-2.0
// The one parameter block of the DCNv3 kernel. No CUDA, TensorRT or torch here. Height comes before width everywhere.
#pragma once

#include <cstdint>

namespace internimage {

// Distances between neighbours, in elements of the tensor's type. A pixel's channels are contiguous.
struct Strides {
    int64_t image;
    int64_t row;
    int64_t pixel;
};

// K = kernel_h * kernel_w, C = group_channels, G = groups.
struct Dcnv3Params {
    const void* input;   // (batch, height, width, G*C)
    const void* offset;  // (batch, out_height, out_width, G*K*2), pairs (x, y) in pixels
    const void* mask;    // (batch, out_height, out_width, G*K), weights, or logits when mask_softmax is 1
    void* output;        // (batch, out_height, out_width, G*C)

    Strides input_strides;
    Strides offset_strides;
    Strides mask_strides;
    Strides output_strides;

    int32_t batch;
    int32_t height;  // pixels
    int32_t width;
    int32_t out_height;
    int32_t out_width;
    int32_t groups;
    int32_t group_channels;

    int32_t kernel_h;  // sampling points
    int32_t kernel_w;
    int32_t stride_h;  // pixels
    int32_t stride_w;
    int32_t pad_h;
    int32_t pad_w;
    int32_t dilation_h;
    int32_t dilation_w;
    float offset_scale;    // scales the whole sampling grid, offsets included
    int32_t mask_softmax;  // 0 or 1
    int32_t allow_half;    // 0 or 1: kernels that interpolate float16 values in float16 are allowed
};

inline int64_t output_side(int64_t side, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    return (side + 2 * pad - (dilation * (kernel - 1) + 1)) / stride + 1;
}

inline Strides dense_strides(int64_t height, int64_t width, int64_t channels) {
    return {height * width * channels, width * channels, channels};
}

// Fills every stride for tensors without gaps.
inline void set_dense_strides(Dcnv3Params& p) {
    const int64_t channels = int64_t{p.groups} * p.group_channels;
    const int64_t points = int64_t{p.groups} * p.kernel_h * p.kernel_w;
    p.input_strides = dense_strides(p.height, p.width, channels);
    p.offset_strides = dense_strides(p.out_height, p.out_width, points * 2);
    p.mask_strides = dense_strides(p.out_height, p.out_width, points);
    p.output_strides = dense_strides(p.out_height, p.out_width, channels);
}

}  // namespace internimage
