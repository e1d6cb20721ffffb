// SPDX-License-Identifier: Apache-2.0
// What the kernels' host versions share.
#pragma once

#include <type_traits>

#include "grid.h"

namespace internimage {

// A made-up GPU size for the default configuration: that of a desktop card.
constexpr int32_t kHostMultiprocessors = 64;

inline LaunchConfig host_config(int32_t tactic, int64_t output_bytes) {
    return tactic > 0 ? kLaunchConfigs[tactic - 1] : default_config(output_bytes, kHostMultiprocessors);
}

// Calls `run(block, x, y, z)` for every thread of a launch.
template <typename Run>
void for_each_thread(const Grid& g, Run run) {
    for (int64_t block = 0; block < g.blocks; ++block) {
        for (int32_t z = 0; z < g.block_z; ++z) {
            for (int32_t y = 0; y < g.block_y; ++y) {
                for (int32_t x = 0; x < g.block_x; ++x) run(static_cast<uint32_t>(block), x, y, z);
            }
        }
    }
}

template <typename T>
constexpr DType dtype_of() {
    if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
    if constexpr (std::is_same_v<T, Half>) return DType::kFloat16;
    return DType::kBFloat16;
}

}  // namespace internimage
