// SPDX-License-Identifier: Apache-2.0
#include "ms_deform_attn_variants.h"

#include <algorithm>

namespace internimage {

MsDeformAttnChoice choose_variant(const MsDeformAttnParams& p, DType dtype, const LaunchConfig& config) {
    const int64_t bytes = scalar_bytes(dtype);
    int32_t width = static_cast<int32_t>(16 / bytes);
    const auto fits = [&](int32_t w) {
        return p.head_channels % w == 0 && aligned(p.value, w * bytes) && aligned(p.output, w * bytes);
    };
    const int32_t widest = width;
    while (!fits(width)) width /= 2;

    const bool fours = p.points == 4 && aligned(p.sampling_locations, 16) && aligned(p.attention_weights, 4 * bytes);
    const int64_t image_bytes = int64_t{p.keys} * p.heads * p.head_channels * bytes;
    if (!fours || width != widest || image_bytes >= int64_t{1} << 32) return {dtype, width, 1, 0};
    return {dtype, width, config.vectors > 1 && p.head_channels % (2 * width) == 0 ? 2 : 1, 4};
}

Grid make_geometry(const MsDeformAttnParams& p, const MsDeformAttnChoice& choice, const LaunchConfig& config) {
    const int64_t steps = int64_t{p.heads} * p.head_channels / (choice.width * choice.vectors);
    return make_grid({p.batch, 1, p.queries, steps}, config);
}

int64_t output_bytes(const MsDeformAttnParams& p, DType dtype) {
    return int64_t{p.batch} * p.queries * p.heads * p.head_channels * scalar_bytes(dtype);
}

const char* parameter_error(const MsDeformAttnParams& p, DType dtype) {
    if (!is_known(dtype)) return "unknown data type";
    if (p.batch < 1 || p.queries < 1 || p.heads < 1 || p.head_channels < 1 || p.levels < 1 || p.points < 1) {
        return "an empty tensor";
    }
    if (p.keys < 0) return "a negative number of keys";
    // A block may start within the last of them and end beyond: half the range of an int32 leaves room for that.
    constexpr int64_t kMost = int64_t{1} << 30;
    if (p.queries > kMost || int64_t{p.heads} * p.head_channels > kMost) return "more than 2^30 queries or channels";
    if (int64_t{p.levels} * p.points > kMost) return "more than 2^30 points per query and head";
    const int64_t bytes = scalar_bytes(dtype);
    if (!aligned(p.value, bytes) || !aligned(p.attention_weights, bytes) || !aligned(p.output, bytes) ||
        !aligned(p.spatial_shapes, 4) || !aligned(p.level_start_index, 4) || !aligned(p.sampling_locations, 8)) {
        return "a tensor's address is not aligned to its data type";
    }
    return nullptr;
}

}  // namespace internimage
