// SPDX-License-Identifier: Apache-2.0
#include "dcnv3_variants.h"

#include <algorithm>

#include "bilinear.h"

namespace internimage {
namespace {

bool all_multiples(const Strides& s, int64_t of) { return s.image % of == 0 && s.row % of == 0 && s.pixel % of == 0; }

// Bytes from an image's start to its end, a little more than what is ever addressed.
int64_t image_bytes(const Strides& s, int64_t height, int64_t width, int64_t bytes) {
    return (height * s.row + width * s.pixel) * bytes;
}

bool fits_32_bits(const Dcnv3Params& p, int64_t bytes) {
    // The corner after the last pixel is formed, though never read; one row more keeps that below 2^32 too.
    const int64_t largest = std::max({image_bytes(p.input_strides, p.height + 1, p.width, bytes),
                                      image_bytes(p.offset_strides, p.out_height, p.out_width, bytes),
                                      image_bytes(p.mask_strides, p.out_height, p.out_width, bytes),
                                      image_bytes(p.output_strides, p.out_height, p.out_width, bytes)});
    return largest < (int64_t{1} << 32);
}

}  // namespace

Dcnv3Choice choose_variant(const Dcnv3Params& p, DType dtype, const LaunchConfig& config) {
    const int64_t bytes = scalar_bytes(dtype);
    int32_t width = static_cast<int32_t>(16 / bytes);
    const auto fits = [&](int32_t w) {
        return p.group_channels % w == 0 && aligned(p.input, w * bytes) && aligned(p.output, w * bytes) &&
               all_multiples(p.input_strides, w) && all_multiples(p.output_strides, w);
    };
    const int32_t widest = width;
    while (!fits(width)) width /= 2;

    const bool released = p.kernel_h == 3 && p.kernel_w == 3 && (p.group_channels == 16 || p.group_channels == 32);
    const bool pairs = aligned(p.offset, 2 * bytes) && all_multiples(p.offset_strides, 2);
    if (!released || width != widest || !pairs || !fits_32_bits(p, bytes)) {
        return {dtype, width, 1, 0, false, Body::kBranching};
    }
    const bool tuned = p.mask_softmax != 0;
    const int32_t most = tuned && bytes == 2 && p.group_channels == 32 ? 4 : 2;
    const bool granted = config.body != Body::kHalf || (dtype == DType::kFloat16 && p.allow_half != 0);
    return {dtype,
            width,
            std::min(config.vectors, most),
            p.group_channels,
            tuned,
            tuned && granted ? config.body : Body::kBranching};
}

Dcnv3Geometry make_geometry(const Dcnv3Params& p, const Dcnv3Choice& choice, const LaunchConfig& config) {
    const int64_t steps = int64_t{p.groups} * p.group_channels / (choice.width * choice.vectors);
    return {make_grid({p.batch, p.out_height, p.out_width, steps}, config),
            static_cast<float>(p.dilation_h) * p.offset_scale, static_cast<float>(p.dilation_w) * p.offset_scale};
}

int64_t output_bytes(const Dcnv3Params& p, DType dtype) {
    return int64_t{p.batch} * p.out_height * p.out_width * p.groups * p.group_channels * scalar_bytes(dtype);
}

const char* parameter_error(const Dcnv3Params& p, DType dtype) {
    if (!is_known(dtype)) return "unknown data type";
    if (p.batch < 1 || p.height < 1 || p.width < 1 || p.groups < 1 || p.group_channels < 1) return "empty input";
    if (p.kernel_h < 1 || p.kernel_w < 1 || p.stride_h < 1 || p.stride_w < 1 || p.pad_h < 0 || p.pad_w < 0 ||
        p.dilation_h < 1 || p.dilation_w < 1) {
        return "kernel, stride, pad or dilation out of range";
    }
    const int64_t padded_h = p.height + int64_t{p.pad_h} * 2;
    const int64_t padded_w = p.width + int64_t{p.pad_w} * 2;
    if (padded_h > kMaxSide || padded_w > kMaxSide) return "height or width, with padding, above 2097152";
    if (int64_t{p.dilation_h} * (p.kernel_h - 1) >= padded_h || int64_t{p.dilation_w} * (p.kernel_w - 1) >= padded_w) {
        return "the dilated kernel is larger than the padded input";
    }
    if (p.out_height != output_side(p.height, p.kernel_h, p.stride_h, p.pad_h, p.dilation_h) ||
        p.out_width != output_side(p.width, p.kernel_w, p.stride_w, p.pad_w, p.dilation_w)) {
        return "output size does not follow from the input size";
    }
    if (int64_t{p.groups} * p.group_channels > INT32_MAX ||
        int64_t{p.groups} * p.kernel_h * p.kernel_w * 2 > INT32_MAX) {
        return "more than 2^31 channels";
    }
    const int64_t bytes = scalar_bytes(dtype);
    if (!aligned(p.input, bytes) || !aligned(p.offset, bytes) || !aligned(p.mask, bytes) || !aligned(p.output, bytes)) {
        return "a tensor's address is not aligned to its data type";
    }
    return nullptr;
}

}  // namespace internimage
