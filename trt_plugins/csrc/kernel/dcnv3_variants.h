// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of DCNv3, and which of them serves a call. The host build uses the same choice, so that tests
// without a GPU reach every variant.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dcnv3_params.h"
#include "grid.h"

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

// A launch, and what is computed once for it.
struct Geometry {
    Grid grid;
    float reach_h;  // dilation * offset_scale
    float reach_w;
};

// The variant for these parameters. `vectors` is a wish, granted where the group's width allows it.
Choice choose_variant(const Dcnv3Params& p, DType dtype, int32_t vectors);

// Whether configuration `index` differs for these parameters from every earlier one.
bool config_is_distinct(const Dcnv3Params& p, DType dtype, int32_t index);

int64_t output_bytes(const Dcnv3Params& p, DType dtype);

Geometry make_geometry(const Dcnv3Params& p, const Choice& choice, const LaunchConfig& config);

// nullptr, or why the kernel cannot run these parameters.
const char* parameter_error(const Dcnv3Params& p, DType dtype);

}  // namespace internimage
