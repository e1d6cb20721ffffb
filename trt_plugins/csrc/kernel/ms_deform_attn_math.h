// SPDX-License-Identifier: Apache-2.0
// MSDeformAttn's arithmetic for one thread: `V::kVectors` vectors of channels of one head of one query.
#pragma once

#include <cmath>

#include "bilinear.h"
#include "ms_deform_attn_params.h"
#include "ms_deform_attn_variants.h"

namespace internimage {

// Where a level lies in `value`.
struct Level {
    int32_t start;
    int32_t height;  // 0: nowhere
    int32_t width;
};

// A level's place as the tensors state it. They are data in device memory, which nobody has checked: a level that does
// not lie inside `value`, or whose sides locate() cannot serve, is taken for an empty one and reads zero.
KERNEL_HD Level read_level(const MsDeformAttnParams& p, int32_t level) {
    const auto integer = [](const int32_t* from) { return bit_cast<int32_t>(load<Pack<float, 1>>(from)); };
    const int32_t height = integer(p.spatial_shapes + 2 * int64_t{level});
    const int32_t width = integer(p.spatial_shapes + 2 * int64_t{level} + 1);
    const int32_t start = integer(p.level_start_index + level);
    const bool inside = height > 0 && height <= kMaxSide && width > 0 && width <= kMaxSide && start >= 0 &&
                        start + int64_t{height} * width <= p.keys;
    return {start, inside ? height : 0, width};
}

// Where a location, 0 to 1 across `side` pixels, falls. Wild, infinite and NaN locations fall outside: see locate().
KERNEL_HD Place locate_fraction(float location, float side) {
    return locate(fmaf(location, side, -0.5f), 0u - kShifterBits);
}

// sums += the points of one level. `location` and `weight` are the level's first.
template <typename V>
KERNEL_HD void add_level(const MsDeformAttnParams& p, const Source<typename V::Index>& source, const float* location,
                         const typename V::Scalar* weight, float (&sums)[V::kChannels]) {
    using T = typename V::Scalar;
    const float height = static_cast<float>(static_cast<int32_t>(source.height));
    const float width = static_cast<float>(static_cast<int32_t>(source.width));
    const auto add = [&](float x, float y, float w) {
        add_point<T, V::kWidth, V::kVectors>(source, locate_fraction(y, height), locate_fraction(x, width), w, sums);
    };
    if constexpr (V::kPoints == 4) {
        // Fetched before the first sample, so that their latency is paid once.
        float xy[8];
        float w[4];
        unpack(load<Pack<float, 4>>(location), xy);
        unpack(load<Pack<float, 4>>(location + 4), xy + 4);
        unpack(load<Pack<T, 4>>(weight), w);
        KERNEL_UNROLL
        for (int k = 0; k < 4; ++k) add(xy[2 * k], xy[2 * k + 1], w[k]);
    } else {
        for (int32_t k = 0; k < p.points; ++k) {
            float xy[2];
            unpack(load<Pack<float, 2>>(location + 2 * int64_t{k}), xy);
            add(xy[0], xy[1], only(load<Pack<T, 1>>(weight + k)));
        }
    }
}

// Channels [channel, channel + kChannels) of query `query` of image `n`; they belong to one head.
template <typename V>
KERNEL_HD void compute_channels(const MsDeformAttnParams& p, int32_t n, int32_t query, int32_t channel) {
    using T = typename V::Scalar;
    using Index = typename V::Index;
    const int32_t points = V::kPoints ? V::kPoints : p.points;
    const int32_t head = channel / p.head_channels;
    const int64_t channels = int64_t{p.heads} * p.head_channels;
    const int64_t row = int64_t{n} * p.queries + query;
    const int64_t first = (row * p.heads + head) * p.levels * points;
    const float* location = p.sampling_locations + 2 * first;
    const T* weight = static_cast<const T*>(p.attention_weights) + first;
    const char* image = static_cast<const char*>(p.value) + int64_t{n} * p.keys * channels * int64_t{sizeof(T)};
    const Index pixel = Index(channels) * Index(sizeof(T));

    float sums[V::kChannels];
    KERNEL_UNROLL
    for (int c = 0; c < V::kChannels; ++c) sums[c] = 0.0f;
    for (int32_t l = 0; l < p.levels; ++l) {
        const Level level = read_level(p, l);
        if (level.height > 0) {
            const char* map = image + level.start * channels * int64_t{sizeof(T)};
            keep_whole(map);
            const Source<Index> source = {map,
                                          Index(level.width) * pixel,
                                          pixel,
                                          Index(channel) * Index(sizeof(T)),
                                          uint32_t(level.height),
                                          uint32_t(level.width)};
            add_level<V>(p, source, location, weight, sums);
        }
        location += 2 * int64_t{points};
        weight += points;
    }
    store_sums<T, V::kWidth, V::kVectors>(static_cast<T*>(p.output) + row * channels + channel, sums);
}

// The work of thread (x, y, z) of block `block`.
template <typename V>
KERNEL_HD void run_thread(V, const MsDeformAttnParams& p, const Grid& grid, uint32_t block, int32_t x, int32_t y,
                          int32_t z) {
    const Position at = grid.position(block, x, y, z);
    const int32_t channel = at.step * V::kChannels;
    if (channel >= p.heads * p.head_channels || at.column >= p.queries || at.row > 0) return;
    compute_channels<V>(p, at.image, at.column, channel);
}

}  // namespace internimage
