// SPDX-License-Identifier: Apache-2.0
// The one parameter block of the UpsampleArgmax kernel. No CUDA, TensorRT or torch here. Tensors have no gaps.
#pragma once

#include <cstdint>

namespace internimage {

// Labels have kUpsampleFactor times the height and width of the logits.
constexpr int32_t kUpsampleFactor = 4;

struct UpsampleArgmaxParams {
    const void* logits;  // (batch, classes, height, width)
    int32_t* labels;     // (batch, 4 * height, 4 * width)

    int32_t batch;
    int32_t classes;
    int32_t height;
    int32_t width;
};

}  // namespace internimage
