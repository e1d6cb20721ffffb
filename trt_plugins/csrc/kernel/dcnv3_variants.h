// SPDX-License-Identifier: Apache-2.0
// The compiled kernels, the launch configurations, and which of them serves a call. The host build uses the same
// choice, so that tests without a GPU reach every variant.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dcnv3_params.h"
#include "dcnv3_scalar.h"

namespace internimage {

// T: storage type.  width: channels per load or store.  vectors: loads per thread and corner.
// group: channels per group known at compile time, with a 3x3 kernel and 32-bit indices; 0 for any group, kernel and
// size.  softmax: whether the mask holds logits (group != 0 only; the general path asks the parameters).
template <typename T, int width, int vectors, int group, bool softmax>
struct Variant {
    using Scalar = T;
    using Index = std::conditional_t<group != 0, uint32_t, uint64_t>;
    static constexpr int kWidth = width;
    static constexpr int kVectors = vectors;
    static constexpr int kChannels = width * vectors;
    static constexpr int kGroupChannels = group;
    static constexpr int kSide = group ? 3 : 0;
    static constexpr bool kSoftmax = softmax;
    static_assert(width * sizeof(T) <= 16, "the widest access has 16 bytes");
    static_assert(group % (width * vectors) == 0, "a thread's channels belong to one group");
};

// clang-format off
// Every kernel that is compiled for a 16-bit type and for float: X(T, width, vectors, group, softmax).
#define DCNV3_VARIANTS_16(X, T)                                                           \
    X(T, 8, 1, 16, false) X(T, 8, 1, 16, true) X(T, 8, 2, 16, false) X(T, 8, 2, 16, true) \
    X(T, 8, 1, 32, false) X(T, 8, 1, 32, true) X(T, 8, 2, 32, false) X(T, 8, 2, 32, true) \
    X(T, 8, 1, 0, false) X(T, 4, 1, 0, false) X(T, 2, 1, 0, false) X(T, 1, 1, 0, false)
#define DCNV3_VARIANTS_32(X, T)                                                           \
    X(T, 4, 1, 16, false) X(T, 4, 1, 16, true) X(T, 4, 2, 16, false) X(T, 4, 2, 16, true) \
    X(T, 4, 1, 32, false) X(T, 4, 1, 32, true) X(T, 4, 2, 32, false) X(T, 4, 2, 32, true) \
    X(T, 4, 1, 0, false) X(T, 2, 1, 0, false) X(T, 1, 1, 0, false)
// clang-format on

// What selects a variant at run time.
struct Choice {
    DType dtype;
    int32_t width;
    int32_t vectors;
    int32_t group;
    bool softmax;
};

// How the threads of a launch are laid out.
struct LaunchConfig {
    int32_t threads;    // per block, at most
    int32_t vectors;    // per thread
    int32_t tile_rows;  // output rows that a block covers, at most: tall tiles share more input, flat ones write runs
};

// TensorRT times these on the user's GPU; tactic i + 1 is kLaunchConfigs[i]. The order is part of the timing cache's
// key: append, or raise kTacticsRevision.
constexpr LaunchConfig kLaunchConfigs[] = {
    {64, 1, 1}, {64, 1, 4}, {128, 1, 1}, {128, 1, 4}, {256, 1, 1}, {256, 1, 4},
    {64, 2, 1}, {64, 2, 4}, {128, 2, 1}, {128, 2, 4}, {256, 2, 1}, {256, 2, 4},
};
constexpr int32_t kTactics = sizeof(kLaunchConfigs) / sizeof(kLaunchConfigs[0]);
constexpr int32_t kTacticsRevision = 1;
constexpr int32_t kMaxThreads = 256;

// Division of numbers below 2^31 by a number fixed at launch: one multiplication and one shift.
struct Divisor {
    uint32_t value;
    uint32_t multiplier;
    uint32_t shift;

    DCNV3_HD uint32_t divide(uint32_t dividend) const {
        if (value == 1) return dividend;
#ifdef __CUDA_ARCH__
        return __umulhi(dividend, multiplier) >> shift;
#else
        return static_cast<uint32_t>(uint64_t{dividend} * multiplier >> 32) >> shift;
#endif
    }
};

// Blocks number the tiles of all images: channel chunk fastest, then column, row and image. A block's threads are
// (block_x channel steps, block_y columns, block_z rows).
struct Geometry {
    int32_t block_x;
    int32_t block_y;
    int32_t block_z;
    int64_t blocks;
    Divisor chunks;
    Divisor tiles_w;
    Divisor tiles_h;
    float reach_h;  // dilation * offset_scale
    float reach_w;
};

// The variant for these parameters. `vectors` is a wish, granted where the group's width allows it.
Choice choose_variant(const Dcnv3Params& p, DType dtype, int32_t vectors);

// Whether configuration `index` differs for these parameters from every earlier one.
bool config_is_distinct(const Dcnv3Params& p, DType dtype, int32_t index);

// The configuration where nobody timed any: small images get small blocks, so that every multiprocessor has work.
LaunchConfig default_config(const Dcnv3Params& p, DType dtype, int32_t multiprocessors);

Geometry make_geometry(const Dcnv3Params& p, const Choice& choice, const LaunchConfig& config);

// nullptr, or why the kernel cannot run these parameters.
const char* parameter_error(const Dcnv3Params& p, DType dtype);

inline int64_t scalar_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace internimage
