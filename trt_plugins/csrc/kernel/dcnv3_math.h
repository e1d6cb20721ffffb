// SPDX-License-Identifier: Apache-2.0
// DCNv3's arithmetic for one thread: `Variant::kVectors` vectors of channels of one group at one output pixel.
// The same source runs on the device and, for the tests, on the host.
#pragma once

#include <cmath>
#include <type_traits>

#include "dcnv3_params.h"
#include "dcnv3_scalar.h"
#include "dcnv3_variants.h"

namespace internimage {

// 1.5 * 2^23. Added to a float of magnitude below 2^22 it leaves an integer in the low bits of the sum.
constexpr float kShifter = 12582912.0f;
constexpr uint32_t kShifterBits = 0x4b400000u;

// value + kShifter, rounded towards minus infinity.
DCNV3_HD float add_shifter_rounding_down(float value) {
#ifdef __CUDA_ARCH__
    return __fadd_rd(value, kShifter);
#else
    const float sum = value + kShifter;
    return sum - kShifter > value ? sum - 1.0f : sum;
#endif
}

DCNV3_HD float exponential(float value) {
#ifdef __CUDA_ARCH__
    return __expf(value);
#else
    return std::exp(value);
#endif
}

// Where one coordinate of a sampling point falls: `low` is the pixel at or before it, modulo 2^32, and `fraction` in
// [0, 1) how far beyond that pixel it lies.
struct Place {
    uint32_t low;
    float fraction;
};

// `origin` is the whole-pixel position the displacement (pixels) starts from, less kShifterBits, modulo 2^32.
//
// The displacement is kept apart from the origin, so the fraction is as precise at pixel 4000 as at pixel 4. floor()
// and the conversion to an integer would each take a slow instruction; the shifter gives both. No displacement can
// escape the range test that follows (low < side and low + 1 < side, unsigned), because sides are at most 2^21:
// below 2^22 in magnitude the result is exact; beyond, the sum's bits differ from kShifterBits by 2^22 or more,
// infinities and NaNs included, so `low` misses [-1, side) by more than 2^20.
DCNV3_HD Place locate(float displacement, uint32_t origin) {
    const float shifted = add_shifter_rounding_down(displacement);
    return {bit_cast<uint32_t>(shifted) + origin, displacement - (shifted - kShifter)};
}

// A byte distance of `low` steps, where `low` may be a negative number modulo 2^32.
template <typename Index>
DCNV3_HD Index steps(uint32_t low, Index step) {
    return static_cast<Index>(static_cast<std::make_signed_t<Index>>(static_cast<int32_t>(low))) * step;
}

// The part of the input that a thread gathers from. `Index` counts bytes within one image.
template <typename Index>
struct Source {
    const char* image;  // the image's first byte
    Index row;          // bytes from a row to the next
    Index pixel;        // bytes from a pixel to the next
    Index channel;      // bytes from a pixel's start to the thread's first channel
    uint32_t height;
    uint32_t width;
};

// sums += weight * bilinear(input, y, x), zero outside the input.
template <typename T, int kWidth, int kVectors, typename Index>
DCNV3_HD void add_point(const Source<Index>& source, Place y, Place x, float weight, float (&sums)[kVectors * kWidth]) {
    using Vector = Pack<T, kWidth>;
    const float bottom = weight * y.fraction;
    const float top = weight - bottom;
    float weights[4];
    weights[1] = top * x.fraction;
    weights[0] = top - weights[1];
    weights[3] = bottom * x.fraction;
    weights[2] = bottom - weights[3];

    const Index at = steps(y.low, source.row) + steps(x.low, source.pixel) + source.channel;
    const Index corners[4] = {at, at + source.pixel, at + source.row, at + source.row + source.pixel};
    Vector values[4][kVectors];
    if (y.low < source.height - 1 && x.low < source.width - 1) {
        DCNV3_UNROLL
        for (int i = 0; i < 4; ++i) {
            DCNV3_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                values[i][v] = load<Vector>(source.image + corners[i] + v * sizeof(Vector));
            }
        }
    } else {
        DCNV3_UNROLL
        for (int i = 0; i < 4; ++i) {
            const bool inside = y.low + (i >> 1) < source.height && x.low + (i & 1) < source.width;
            // A weight may be NaN when its corner is outside, and NaN * 0 is not 0.
            weights[i] = inside ? weights[i] : 0.0f;
            DCNV3_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                values[i][v] = inside ? load<Vector>(source.image + corners[i] + v * sizeof(Vector)) : zeros<Vector>();
            }
        }
    }
    DCNV3_UNROLL
    for (int i = 0; i < 4; ++i) {
        DCNV3_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            float corner[kWidth];
            unpack(values[i][v], corner);
            DCNV3_UNROLL
            for (int c = 0; c < kWidth; ++c) {
                float& sum = sums[v * kWidth + c];
                sum = fmaf(weights[i], corner[c], sum);
            }
        }
    }
}

// One axis of the sampling grid.
struct Axis {
    uint32_t origin;   // the grid's centre, in pixels, less kShifterBits
    int32_t dilation;  // pixels
    int32_t radius;    // pixels from the first point to the centre, rounded down
    float scale;
    float reach;  // dilation * scale

    // Pixels from the centre to a point that the network moved by `learnt`.
    DCNV3_HD float displacement(int32_t point, float learnt) const {
        return fmaf(learnt, scale, static_cast<float>(point * dilation - radius) * scale);
    }
    // The same for a grid of three points.
    DCNV3_HD float displacement_of_3(int32_t point, float learnt) const {
        return fmaf(learnt, scale, static_cast<float>(point - 1) * reach);
    }
};

DCNV3_HD Axis make_axis(int32_t position, int32_t kernel, int32_t stride, int32_t pad, int32_t dilation, float scale,
                        float reach) {
    const int32_t radius = dilation * (kernel - 1) / 2;
    const uint32_t origin = static_cast<uint32_t>(position * stride - pad + radius) - kShifterBits;
    return {origin, dilation, radius, scale, reach};
}

template <typename T>
DCNV3_HD float only(const Pack<T, 1>& pack) {
    float value;
    unpack(pack, &value);
    return value;
}

// Every point of a 3x3 grid: offsets and masks are fetched before the first sample, so that their latency is paid
// once, and the loop is unrolled. Returns what the sums have to be divided by.
template <typename V>
DCNV3_HD float sum_points_3x3(const Source<typename V::Index>& source, const Axis& y_axis, const Axis& x_axis,
                              const typename V::Scalar* offset, const typename V::Scalar* mask,
                              float (&sums)[V::kChannels]) {
    using T = typename V::Scalar;
    constexpr int kPoints = 9;
    Pack<T, 2> offsets[kPoints];
    Pack<T, 1> masks[kPoints];
    DCNV3_UNROLL
    for (int k = 0; k < kPoints; ++k) offsets[k] = load<Pack<T, 2>>(offset + 2 * k);
    DCNV3_UNROLL
    for (int k = 0; k < kPoints; ++k) masks[k] = load<Pack<T, 1>>(mask + k);

    float largest = only(masks[0]);
    float total = 1.0f;
    if (V::kSoftmax) {
        DCNV3_UNROLL
        for (int k = 1; k < kPoints; ++k) largest = fmaxf(largest, only(masks[k]));
        total = 0.0f;
    }
    DCNV3_UNROLL
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
        add_point<T, V::kWidth, V::kVectors>(source, y, x, weight, sums);
    }
    return total;
}

// Any grid, one point at a time.
template <typename V>
DCNV3_HD float sum_points_any(const Dcnv3Params& p, const Source<typename V::Index>& source, const Axis& y_axis,
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
DCNV3_HD void compute_channels(const Dcnv3Params& p, const Geometry& g, int32_t n, int32_t ho, int32_t wo,
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
#ifdef __CUDA_ARCH__
    // Hidden from the optimiser, or it adds the two parts of this address to every corner instead of once.
    asm("" : "+l"(image));
#endif
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
    DCNV3_UNROLL
    for (int c = 0; c < V::kChannels; ++c) sums[c] = 0.0f;
    float total = 1.0f;
    if constexpr (V::kSide == 3) {
        total = sum_points_3x3<V>(source, y_axis, x_axis, offset, mask, sums);
    } else {
        total = sum_points_any<V>(p, source, y_axis, x_axis, offset, mask, sums);
    }
    const float factor = (V::kSide == 0 ? p.mask_softmax != 0 : V::kSoftmax) ? 1.0f / total : 1.0f;

    DCNV3_UNROLL
    for (int c = 0; c < V::kChannels; ++c) sums[c] *= factor;
    T* output = static_cast<T*>(p.output) + pixel(p.output_strides, channel);
    DCNV3_UNROLL
    for (int v = 0; v < V::kVectors; ++v) {
        store(output + v * V::kWidth, pack_values<T, V::kWidth>(sums + v * V::kWidth));
    }
}

// The work of thread (x, y, z) of block `block`.
template <typename V>
DCNV3_HD void run_thread(const Dcnv3Params& p, const Geometry& geometry, uint32_t block, int32_t x, int32_t y,
                         int32_t z) {
    const uint32_t tile = geometry.chunks.divide(block);
    const uint32_t chunk = block - tile * geometry.chunks.value;
    const uint32_t tile_row = geometry.tiles_w.divide(tile);
    const uint32_t tile_w = tile - tile_row * geometry.tiles_w.value;
    const uint32_t n = geometry.tiles_h.divide(tile_row);
    const uint32_t tile_h = tile_row - n * geometry.tiles_h.value;

    const int32_t channel = (static_cast<int32_t>(chunk) * geometry.block_x + x) * V::kChannels;
    const int32_t wo = static_cast<int32_t>(tile_w) * geometry.block_y + y;
    const int32_t ho = static_cast<int32_t>(tile_h) * geometry.block_z + z;
    if (channel >= p.groups * p.group_channels || wo >= p.out_width || ho >= p.out_height) return;
    compute_channels<V>(p, geometry, static_cast<int32_t>(n), ho, wo, channel);
}

}  // namespace internimage
