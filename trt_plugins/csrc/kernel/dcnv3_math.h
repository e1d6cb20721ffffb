// SPDX-License-Identifier: Apache-2.0
// DCNv3's arithmetic for one thread: `V::kVectors` vectors of channels of one group at one output pixel.
// The same source runs on the device and, for the tests, on the host.
#pragma once

#include <cmath>

#include "bilinear.h"
#include "dcnv3_params.h"
#include "dcnv3_variants.h"

namespace internimage {

KERNEL_HD float exponential(float value) {
#ifdef __CUDA_ARCH__
    return __expf(value);
#else
    return std::exp(value);
#endif
}

// One axis of the sampling grid.
struct Axis {
    uint32_t origin;   // the grid's centre, in pixels, less kShifterBits
    int32_t dilation;  // pixels
    int32_t radius;    // pixels from the first point to the centre, rounded down
    float scale;
    float reach;  // dilation * scale

    // Pixels from the centre to a point that the network moved by `learnt`.
    KERNEL_HD float displacement(int32_t point, float learnt) const {
        return fmaf(learnt, scale, static_cast<float>(point * dilation - radius) * scale);
    }
    // The same for a grid of three points.
    KERNEL_HD float displacement_of_3(int32_t point, float learnt) const {
        return fmaf(learnt, scale, static_cast<float>(point - 1) * reach);
    }
};

KERNEL_HD Axis make_axis(int32_t position, int32_t kernel, int32_t stride, int32_t pad, int32_t dilation, float scale,
                         float reach) {
    const int32_t radius = dilation * (kernel - 1) / 2;
    const uint32_t origin = static_cast<uint32_t>(position * stride - pad + radius) - kShifterBits;
    return {origin, dilation, radius, scale, reach};
}

// Every point of a 3x3 grid: offsets and masks are fetched before the first sample, so that their latency is paid
// once, and the loop is unrolled. Returns what the sums have to be divided by.
template <typename V>
KERNEL_HD float sum_points_3x3(const Source<typename V::Index>& source, const Axis& y_axis, const Axis& x_axis,
                               const typename V::Scalar* offset, const typename V::Scalar* mask,
                               float (&sums)[V::kChannels]) {
    using T = typename V::Scalar;
    constexpr int kPoints = 9;
    Pack<T, 2> offsets[kPoints];
    Pack<T, 1> masks[kPoints];
    KERNEL_UNROLL
    for (int k = 0; k < kPoints; ++k) offsets[k] = load<Pack<T, 2>>(offset + 2 * k);
    KERNEL_UNROLL
    for (int k = 0; k < kPoints; ++k) masks[k] = load<Pack<T, 1>>(mask + k);

    float largest = only(masks[0]);
    float total = 1.0f;
    if (V::kSoftmax) {
        KERNEL_UNROLL
        for (int k = 1; k < kPoints; ++k) largest = fmaxf(largest, only(masks[k]));
        total = 0.0f;
    }
    KERNEL_UNROLL
    for (int k = 0; k < kPoints; ++k) {
        float weight = only(masks[k]);
        if (V::kSoftmax) {
            weight = exponential(weight - largest);
            total += weight;
        }
        float offset_xy[2];
        unpack(offsets[k], offset_xy);
        const Place y = locate(y_axis.displacement_of_3(k % 3, offset_xy[1]), y_axis.origin);
        const Place x = locate(x_axis.displacement_of_3(k / 3, offset_xy[0]), x_axis.origin);
        add_point<T, V::kWidth, V::kVectors, V::kBody>(source, y, x, weight, sums);
    }
    return total;
}

// Any grid, one point at a time.
template <typename V>
KERNEL_HD float sum_points_any(const Dcnv3Params& p, const Source<typename V::Index>& source, const Axis& y_axis,
                               const Axis& x_axis, const typename V::Scalar* offset, const typename V::Scalar* mask,
                               float (&sums)[V::kChannels]) {
    using T = typename V::Scalar;
    const int64_t points = int64_t{p.kernel_h} * p.kernel_w;
    float largest = 0.0f;
    float total = 1.0f;
    if (p.mask_softmax) {
        largest = only(load<Pack<T, 1>>(mask));
        for (int64_t k = 1; k < points; ++k) largest = fmaxf(largest, only(load<Pack<T, 1>>(mask + k)));
        total = 0.0f;
    }
    for (int32_t kx = 0; kx < p.kernel_w; ++kx) {
        for (int32_t ky = 0; ky < p.kernel_h; ++ky) {
            const float offset_x = only(load<Pack<T, 1>>(offset));
            const float offset_y = only(load<Pack<T, 1>>(offset + 1));
            float weight = only(load<Pack<T, 1>>(mask));
            if (p.mask_softmax) {
                weight = exponential(weight - largest);
                total += weight;
            }
            const Place y = locate(y_axis.displacement(ky, offset_y), y_axis.origin);
            const Place x = locate(x_axis.displacement(kx, offset_x), x_axis.origin);
            add_point<T, V::kWidth, V::kVectors>(source, y, x, weight, sums);
            offset += 2;
            ++mask;
        }
    }
    return total;
}

// Channels [channel, channel + kChannels) of output pixel (n, ho, wo); they belong to one group.
template <typename V>
KERNEL_HD void compute_channels(const Dcnv3Params& p, const Dcnv3Geometry& g, int32_t n, int32_t ho, int32_t wo,
                                int32_t channel) {
    using T = typename V::Scalar;
    using Index = typename V::Index;
    const int32_t group = channel / (V::kGroupChannels ? V::kGroupChannels : p.group_channels);
    const int32_t points = V::kSide ? V::kSide * V::kSide : p.kernel_h * p.kernel_w;
    const auto pixel = [&](const Strides& strides, int32_t first) {
        return int64_t{n} * strides.image +
               static_cast<int64_t>(Index(ho) * Index(strides.row) + Index(wo) * Index(strides.pixel) + Index(first));
    };
    const T* offset = static_cast<const T*>(p.offset) + pixel(p.offset_strides, group * points * 2);
    const T* mask = static_cast<const T*>(p.mask) + pixel(p.mask_strides, group * points);
    const char* image = static_cast<const char*>(p.input) + int64_t{n} * p.input_strides.image * int64_t{sizeof(T)};
    keep_whole(image);
    const Source<Index> source = {image,
                                  Index(p.input_strides.row) * Index(sizeof(T)),
                                  Index(p.input_strides.pixel) * Index(sizeof(T)),
                                  Index(channel) * Index(sizeof(T)),
                                  uint32_t(p.height),
                                  uint32_t(p.width)};
    const int32_t side_h = V::kSide ? V::kSide : p.kernel_h;
    const int32_t side_w = V::kSide ? V::kSide : p.kernel_w;
    const Axis y_axis = make_axis(ho, side_h, p.stride_h, p.pad_h, p.dilation_h, p.offset_scale, g.reach_h);
    const Axis x_axis = make_axis(wo, side_w, p.stride_w, p.pad_w, p.dilation_w, p.offset_scale, g.reach_w);

    float sums[V::kChannels];
    KERNEL_UNROLL
    for (int c = 0; c < V::kChannels; ++c) sums[c] = 0.0f;
    float total = 1.0f;
    if constexpr (V::kSide == 3) {
        total = sum_points_3x3<V>(source, y_axis, x_axis, offset, mask, sums);
    } else {
        total = sum_points_any<V>(p, source, y_axis, x_axis, offset, mask, sums);
    }
    const float factor = (V::kSide == 0 ? p.mask_softmax != 0 : V::kSoftmax) ? 1.0f / total : 1.0f;

    KERNEL_UNROLL
    for (int c = 0; c < V::kChannels; ++c) sums[c] *= factor;
    T* output = static_cast<T*>(p.output) + pixel(p.output_strides, channel);
    store_sums<T, V::kWidth, V::kVectors>(output, sums);
}

// The work of thread (x, y, z) of block `block`.
template <typename V>
KERNEL_HD void run_thread(V, const Dcnv3Params& p, const Dcnv3Geometry& geometry, uint32_t block, int32_t x, int32_t y,
                          int32_t z) {
    const Position at = geometry.grid.position(block, x, y, z);
    const int32_t channel = at.step * V::kChannels;
    if (channel >= p.groups * p.group_channels || at.column >= p.out_width || at.row >= p.out_height) return;
    compute_channels<V>(p, geometry, at.image, at.row, at.column, channel);
}

}  // namespace internimage
