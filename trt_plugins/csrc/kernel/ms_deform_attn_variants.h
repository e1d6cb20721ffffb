// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of MSDeformAttn, and which of them serves a call. The host build uses the same choice, so that
// tests without a GPU reach every variant.
#pragma once

#include <cstdint>
#include <type_traits>

#include "ms_deform_attn_params.h"
#include "variants.h"

namespace internimage {

// What selects a variant at run time.
struct MsDeformAttnChoice {
    DType dtype;
    int32_t width;
    int32_t vectors;
    int32_t points;

    bool operator==(const MsDeformAttnChoice& o) const {
        return dtype == o.dtype && width == o.width && vectors == o.vectors && points == o.points;
    }
};

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

    static constexpr MsDeformAttnChoice choice() { return {dtype_of<T>(), width, vectors, points}; }
};

template <typename T>
struct VariantsOf<MsDeformAttnParams, T> {
    template <int width, int vectors, int points>
    using V = MsDeformAttnVariant<T, width, vectors, points>;
    static constexpr int kWidest = 16 / sizeof(T);

    using Any = VariantList<V<4, 1, 0>, V<2, 1, 0>, V<1, 1, 0>>;
    using Widest = std::conditional_t<sizeof(T) == 2, VariantList<V<kWidest, 1, 0>>, VariantList<>>;
    using List = decltype(VariantList<V<kWidest, 1, 4>, V<kWidest, 2, 4>>{} + Widest{} + Any{});
};

// The variant for these parameters. The configuration's vectors are a wish, granted where a head's channels allow it.
MsDeformAttnChoice choose_variant(const MsDeformAttnParams& p, DType dtype, const LaunchConfig& config);

// Queries are the grid's columns.
Grid make_geometry(const MsDeformAttnParams& p, const MsDeformAttnChoice& choice, const LaunchConfig& config);

int64_t output_bytes(const MsDeformAttnParams& p, DType dtype);

// nullptr, or why the kernel cannot run these parameters.
const char* parameter_error(const MsDeformAttnParams& p, DType dtype);

}  // namespace internimage
