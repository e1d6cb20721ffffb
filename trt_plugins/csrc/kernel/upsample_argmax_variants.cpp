// SPDX-License-Identifier: Apache-2.0
#include "upsample_argmax_variants.h"

namespace internimage {

UpsampleArgmaxChoice choose_variant(const UpsampleArgmaxParams& /*p*/, DType dtype, const LaunchConfig& config) {
    return {dtype, config.vectors > 1 ? kUpsampleFactor : 1};
}

Grid make_geometry(const UpsampleArgmaxParams& p, const UpsampleArgmaxChoice& choice, const LaunchConfig& config) {
    // Tiles of four rows and columns lie between logits, so one more than there are logits touch the labels.
    const int64_t rows = choice.rows == 1 ? int64_t{p.height} * kUpsampleFactor : int64_t{p.height} + 1;
    return make_grid({p.batch, rows, int64_t{p.width} + 1, 1}, config);
}

int64_t output_bytes(const UpsampleArgmaxParams& p, DType /*dtype*/) {
    return int64_t{p.batch} * p.height * p.width * kUpsampleFactor * kUpsampleFactor * int64_t{sizeof(int32_t)};
}

const char* parameter_error(const UpsampleArgmaxParams& p, DType dtype) {
    if (!is_known(dtype)) return "unknown data type";
    if (p.batch < 1 || p.classes < 1 || p.height < 1 || p.width < 1) return "an empty tensor";
    constexpr int32_t kMost = 1 << 20;
    if (p.height > kMost || p.width > kMost) return "height or width above 1048576";
    if (int64_t{p.height} * p.width > INT32_MAX) return "more than 2^31 logits per class";
    if (!aligned(p.logits, scalar_bytes(dtype)) || !aligned(p.labels, 8)) {
        return "the logits are not aligned to their data type, or the labels not to 8 bytes";
    }
    return nullptr;
}

}  // namespace internimage
