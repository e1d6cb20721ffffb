// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of MSDeformAttn, and which of them serves a call. The host build uses the same choice, so that
// tests without a GPU reach every variant.
#pragma once

#include <cstdint>
#include <type_traits>

#include "grid.h"
#include "ms_deform_attn_params.h"
#include "scalar.h"

namespace internimage {

// T: storage type.  width: channels per load or store.  vectors: loads per thread and corner.
// points: points per level known at compile time, with 32-bit indices; 0 for any number and size.
template <typename T, int width, int vectors, int points>
struct MsDeformAttnVariant {
    using Scalar = T;
    using Index = std::conditional_t<points != 0, uint32_t, uint64_t>;
    static constexpr int kWidth = width;
    static constexpr int kVectors = vectors;
    static constexpr int kChannels = width * vectors;
    static constexpr int kPoints = points;
    static_assert(width * sizeof(T) <= 16, "the widest access has 16 bytes");
};

// clang-format off
// Every kernel that is compiled for a 16-bit type and for float: X(T, width, vectors, points).
#define MS_DEFORM_ATTN_VARIANTS_16(X, T) \
    X(T, 8, 1, 4) X(T, 8, 2, 4) X(T, 8, 1, 0) X(T, 4, 1, 0) X(T, 2, 1, 0) X(T, 1, 1, 0)
#define MS_DEFORM_ATTN_VARIANTS_32(X, T) \
    X(T, 4, 1, 4) X(T, 4, 2, 4) X(T, 4, 1, 0) X(T, 2, 1, 0) X(T, 1, 1, 0)
// clang-format on

// What selects a variant at run time.
struct MsDeformAttnChoice {
    DType dtype;
    int32_t width;
    int32_t vectors;
    int32_t points;
};

// The variant for these parameters. `vectors` is a wish, granted where a head's channels allow it.
MsDeformAttnChoice choose_variant(const MsDeformAttnParams& p, DType dtype, int32_t vectors);

// Queries are the grid's columns.
Grid make_grid(const MsDeformAttnParams& p, const MsDeformAttnChoice& choice, const LaunchConfig& config);

// Whether configuration `index` differs for these parameters from every earlier one.
bool config_is_distinct(const MsDeformAttnParams& p, DType dtype, int32_t index);

int64_t output_bytes(const MsDeformAttnParams& p, DType dtype);

// nullptr, or why the kernel cannot run these parameters.
const char* parameter_error(const MsDeformAttnParams& p, DType dtype);

}  // namespace internimage
