// SPDX-License-Identifier: Apache-2.0
// The one parameter block of the MSDeformAttn kernel. No CUDA, TensorRT or torch here. Tensors have no gaps.
#pragma once

#include <cstdint>

namespace internimage {

struct MsDeformAttnParams {
    const void* value;                 // (batch, keys, heads, head_channels); levels one after another, row by row
    const int32_t* spatial_shapes;     // (levels, 2): height, width
    const int32_t* level_start_index;  // (levels): a level's first key
    const float* sampling_locations;  // (batch, queries, heads, levels, points, 2): x, y, 0 to 1 across the level's map
    const void* attention_weights;    // (batch, queries, heads, levels, points)
    void* output;                     // (batch, queries, heads * head_channels)

    int32_t batch;
    int32_t keys;
    int32_t queries;
    int32_t heads;
    int32_t head_channels;
    int32_t levels;
    int32_t points;
};

}  // namespace internimage
