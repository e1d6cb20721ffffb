// SPDX-License-Identifier: Apache-2.0
// How the threads of a launch are laid over an output of images, rows, columns and channels, for every kernel here.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace internimage {

// How a sampling kernel computes a point. Operators without such kernels have kBranching alone.
enum class Body : int32_t {
    kBranching,   // one test for "all four corners are inside", and a slower path for the others
    kBranchFree,  // clamped addresses and zeroed weights: loads of one point need not wait for another's sums
    kHalf,        // branch-free, and the four corners' weights and sums are pairs of halves
};

struct LaunchConfig {
    int32_t threads;    // per block, at most
    int32_t vectors;    // accesses per thread and corner, at most
    int32_t tile_rows;  // output rows that a block covers, at most: tall tiles share more input, flat ones write runs
    Body body = Body::kBranching;
};

// TensorRT times these on the user's GPU; tactic i + 1 is kLaunchConfigs[i]. The order is part of the timing cache's
// key: append, or raise kTacticsRevision.
// clang-format off
constexpr LaunchConfig kLaunchConfigs[] = {
    {64, 1, 1}, {64, 1, 4}, {128, 1, 1}, {128, 1, 4}, {256, 1, 1}, {256, 1, 4},
    {64, 2, 1}, {64, 2, 4}, {128, 2, 1}, {128, 2, 4}, {256, 2, 1}, {256, 2, 4},
    {64, 4, 4}, {128, 4, 4}, {256, 4, 4},
    {64, 1, 1, Body::kBranchFree}, {128, 1, 4, Body::kBranchFree}, {256, 1, 4, Body::kBranchFree},
    {64, 2, 1, Body::kBranchFree}, {128, 2, 4, Body::kBranchFree}, {256, 2, 4, Body::kBranchFree},
    {128, 4, 4, Body::kBranchFree}, {256, 4, 4, Body::kBranchFree},
    {64, 1, 1, Body::kHalf}, {128, 1, 4, Body::kHalf}, {256, 1, 4, Body::kHalf},
    {64, 2, 1, Body::kHalf}, {128, 2, 4, Body::kHalf}, {256, 2, 4, Body::kHalf},
    {128, 4, 4, Body::kHalf}, {256, 4, 4, Body::kHalf},
};
// clang-format on
constexpr int32_t kTactics = sizeof(kLaunchConfigs) / sizeof(kLaunchConfigs[0]);
constexpr int32_t kTacticsRevision = 2;
constexpr int32_t kMaxThreads = 256;

// The configuration where nobody timed any: small outputs get small blocks, so that every multiprocessor has work.
LaunchConfig default_config(int64_t output_bytes, int32_t multiprocessors);

// Division of numbers below 2^31 by a number fixed at launch: one multiplication and one shift.
struct Divisor {
    uint32_t value;
    uint32_t multiplier;
    uint32_t shift;

    KERNEL_HD uint32_t divide(uint32_t dividend) const {
        if (value == 1) return dividend;
#ifdef __CUDA_ARCH__
        return __umulhi(dividend, multiplier) >> shift;
#else
        return static_cast<uint32_t>(uint64_t{dividend} * multiplier >> 32) >> shift;
#endif
    }
};

// What is to be covered. A step is the channels of one thread.
struct Extent {
    int64_t images;
    int64_t rows;
    int64_t columns;
    int64_t steps;
};

// A thread's share of it; beyond the extent for threads that are left over.
struct Position {
    int32_t image;
    int32_t row;
    int32_t column;
    int32_t step;
};

// Blocks number the tiles of all images: chunk of steps fastest, then column, row and image. A block's threads are
// (block_x steps, block_y columns, block_z rows).
struct Grid {
    int32_t block_x;
    int32_t block_y;
    int32_t block_z;
    int64_t blocks;
    Divisor chunks;
    Divisor tiles_w;
    Divisor tiles_h;

    // Of thread (x, y, z) of block `block`.
    KERNEL_HD Position position(uint32_t block, int32_t x, int32_t y, int32_t z) const {
        const uint32_t tile = chunks.divide(block);
        const uint32_t chunk = block - tile * chunks.value;
        const uint32_t tile_row = tiles_w.divide(tile);
        const uint32_t tile_w = tile - tile_row * tiles_w.value;
        const uint32_t image = tiles_h.divide(tile_row);
        const uint32_t tile_h = tile_row - image * tiles_h.value;
        return {static_cast<int32_t>(image), static_cast<int32_t>(tile_h) * block_z + z,
                static_cast<int32_t>(tile_w) * block_y + y, static_cast<int32_t>(chunk) * block_x + x};
    }
};

Grid make_grid(const Extent& extent, const LaunchConfig& config);

// Of what make_geometry() returns for operators that need no more than a grid.
inline const Grid& grid_of(const Grid& grid) { return grid; }

}  // namespace internimage
