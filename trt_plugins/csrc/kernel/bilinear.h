// SPDX-License-Identifier: Apache-2.0
// Bilinear sampling for one thread: where a point falls, and adding what it reads to the thread's sums. The same source
// runs on the device and, for the tests, on the host.
#pragma once

#include <cmath>
#include <type_traits>

#include "grid.h"
#include "half_pairs.h"

namespace internimage {

// The largest height or width, padding included, for which locate() is proven.
constexpr int32_t kMaxSide = 1 << 21;

// 1.5 * 2^23. Added to a float of magnitude below 2^22 it leaves an integer in the low bits of the sum.
constexpr float kShifter = 12582912.0f;
constexpr uint32_t kShifterBits = 0x4b400000u;

// value + kShifter, rounded towards minus infinity.
KERNEL_HD float add_shifter_rounding_down(float value) {
#ifdef __CUDA_ARCH__
    return __fadd_rd(value, kShifter);
#else
    const float sum = value + kShifter;
    return sum - kShifter > value ? sum - 1.0f : sum;
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
KERNEL_HD Place locate(float displacement, uint32_t origin) {
    const float shifted = add_shifter_rounding_down(displacement);
    return {bit_cast<uint32_t>(shifted) + origin, displacement - (shifted - kShifter)};
}

// A byte distance of `low` steps, where `low` may be a negative number modulo 2^32.
template <typename Index>
KERNEL_HD Index steps(uint32_t low, Index step) {
    return static_cast<Index>(static_cast<std::make_signed_t<Index>>(static_cast<int32_t>(low))) * step;
}

// The map that a thread gathers from. `Index` counts bytes within it.
template <typename Index>
struct Source {
    const char* map;  // the map's first byte
    Index row;        // bytes from a row to the next
    Index pixel;      // bytes from a pixel to the next
    Index channel;    // bytes from a pixel's start to the thread's first channel
    uint32_t height;
    uint32_t width;
};

// The shares of `weight` of the corners (low, low), (low, low + 1), (low + 1, low), (low + 1, low + 1) in (y, x).
KERNEL_HD void corner_weights(float weight, Place y, Place x, float (&weights)[4]) {
    const float bottom = weight * y.fraction;
    const float top = weight - bottom;
    weights[1] = top * x.fraction;
    weights[0] = top - weights[1];
    weights[3] = bottom * x.fraction;
    weights[2] = bottom - weights[3];
}

// sums += sum over i of weights[i] * values[i].
template <typename T, int kWidth, int kVectors>
KERNEL_HD void add_corners(const Pack<T, kWidth> (&values)[4][kVectors], const float (&weights)[4],
                           float (&sums)[kVectors * kWidth]) {
    KERNEL_UNROLL
    for (int i = 0; i < 4; ++i) {
        KERNEL_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            float corner[kWidth];
            unpack(values[i][v], corner);
            KERNEL_UNROLL
            for (int c = 0; c < kWidth; ++c) {
                float& sum = sums[v * kWidth + c];
                sum = fmaf(weights[i], corner[c], sum);
            }
        }
    }
}

// Body::kBranching.
template <typename T, int kWidth, int kVectors, typename Index>
KERNEL_HD void add_point_branching(const Source<Index>& source, Place y, Place x, float weight,
                                   float (&sums)[kVectors * kWidth]) {
    using Vector = Pack<T, kWidth>;
    float weights[4];
    corner_weights(weight, y, x, weights);
    const Index at = steps(y.low, source.row) + steps(x.low, source.pixel) + source.channel;
    const Index corners[4] = {at, at + source.pixel, at + source.row, at + source.row + source.pixel};
    Vector values[4][kVectors];
    if (y.low < source.height - 1 && x.low < source.width - 1) {
        KERNEL_UNROLL
        for (int i = 0; i < 4; ++i) {
            KERNEL_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                values[i][v] = load<Vector>(source.map + corners[i] + v * sizeof(Vector));
            }
        }
    } else {
        KERNEL_UNROLL
        for (int i = 0; i < 4; ++i) {
            const bool inside = y.low + (i >> 1) < source.height && x.low + (i & 1) < source.width;
            // A weight may be NaN when its corner is outside, and NaN * 0 is not 0.
            weights[i] = inside ? weights[i] : 0.0f;
            KERNEL_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                values[i][v] = inside ? load<Vector>(source.map + corners[i] + v * sizeof(Vector)) : zeros<Vector>();
            }
        }
    }
    add_corners<T, kWidth, kVectors>(values, weights, sums);
}

KERNEL_HD uint32_t clamp_to(uint32_t low, uint32_t side) {
    const auto signed_low = static_cast<int32_t>(low);
    const auto last = static_cast<int32_t>(side - 1);
    return static_cast<uint32_t>(signed_low < 0 ? 0 : signed_low < last ? signed_low : last);
}

// Body::kBranchFree and Body::kHalf. A corner outside the map reads the nearest pixel with weight zero, so an infinite
// or NaN pixel on the border also shows in points beyond that border.
template <typename T, int kWidth, int kVectors, bool kInHalves, typename Index>
KERNEL_HD void add_point_branch_free(const Source<Index>& source, Place y, Place x, float weight,
                                     float (&sums)[kVectors * kWidth]) {
    using Vector = Pack<T, kWidth>;
    // In halves the corners' weights leave out the point's own: their sum is at most 1.
    float weights[4];
    corner_weights(kInHalves ? 1.0f : weight, y, x, weights);
    Vector values[4][kVectors];
    KERNEL_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = y.low + (i >> 1);
        const uint32_t column = x.low + (i & 1);
        weights[i] = row < source.height && column < source.width ? weights[i] : 0.0f;
        const Index at = Index(clamp_to(row, source.height)) * source.row +
                         Index(clamp_to(column, source.width)) * source.pixel + source.channel;
        KERNEL_UNROLL
        for (int v = 0; v < kVectors; ++v) values[i][v] = load<Vector>(source.map + at + v * sizeof(Vector));
    }
    if constexpr (kInHalves) {
        HalfPair pairs[4];
        KERNEL_UNROLL
        for (int i = 0; i < 4; ++i) pairs[i] = pair_of(weights[i]);
        KERNEL_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            Vector point;
            KERNEL_UNROLL
            for (int w = 0; w < Vector::kWords; ++w) {
                HalfPair value = mul_pairs(pairs[0], {values[0][v].word[w]});
                KERNEL_UNROLL
                for (int i = 1; i < 4; ++i) value = fma_pairs(pairs[i], {values[i][v].word[w]}, value);
                point.word[w] = value.bits;
            }
            float wide[kWidth];
            unpack(point, wide);
            KERNEL_UNROLL
            for (int c = 0; c < kWidth; ++c) sums[v * kWidth + c] = fmaf(weight, wide[c], sums[v * kWidth + c]);
        }
    } else {
        add_corners<T, kWidth, kVectors>(values, weights, sums);
    }
}

// sums += weight * bilinear(map, y, x), zero outside the map.
template <typename T, int kWidth, int kVectors, Body kBody = Body::kBranching, typename Index>
KERNEL_HD void add_point(const Source<Index>& source, Place y, Place x, float weight,
                         float (&sums)[kVectors * kWidth]) {
    if constexpr (kBody == Body::kBranching) {
        add_point_branching<T, kWidth, kVectors>(source, y, x, weight, sums);
    } else {
        add_point_branch_free<T, kWidth, kVectors, kBody == Body::kHalf>(source, y, x, weight, sums);
    }
}

// Hides an address from the optimiser, or it adds the parts that the address is made of to every corner instead of
// once.
KERNEL_HD void keep_whole(const char*& address) {
#ifdef __CUDA_ARCH__
    asm("" : "+l"(address));
#else
    static_cast<void>(address);
#endif
}

// Writes a thread's sums in the storage type.
template <typename T, int kWidth, int kVectors>
KERNEL_HD void store_sums(T* output, const float (&sums)[kVectors * kWidth]) {
    KERNEL_UNROLL
    for (int v = 0; v < kVectors; ++v) store(output + v * kWidth, pack_values<T, kWidth>(sums + v * kWidth));
}

}  // namespace internimage
