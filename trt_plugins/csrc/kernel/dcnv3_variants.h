// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of DCNv3, and which of them serves a call. The host build uses the same choice, so that tests
// without a GPU reach every variant.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dcnv3_params.h"
#include "variants.h"

namespace internimage {

// What selects a variant at run time.
struct Dcnv3Choice {
    DType dtype;
    int32_t width;
    int32_t vectors;
    int32_t group;
    int32_t softmax;
    Body body;

    bool operator==(const Dcnv3Choice& o) const {
        return dtype == o.dtype && width == o.width && vectors == o.vectors && group == o.group &&
               softmax == o.softmax && body == o.body;
    }
};

// T: storage type.  width: channels per load or store.  vectors: loads per thread and corner.
// group: channels per group known at compile time, with a 3x3 kernel and 32-bit indices; 0 for any group, kernel and
// size.  softmax: whether the mask holds logits (group != 0 only; the general path asks the parameters).
template <typename T, int width, int vectors, int group, bool softmax, Body body = Body::kBranching>
struct Dcnv3Variant {
    using Scalar = T;
    using Index = std::conditional_t<group != 0, uint32_t, uint64_t>;
    static constexpr int kWidth = width;
    static constexpr int kVectors = vectors;
    static constexpr int kChannels = width * vectors;
    static constexpr int kGroupChannels = group;
    static constexpr int kSide = group ? 3 : 0;
    static constexpr bool kSoftmax = softmax;
    static constexpr Body kBody = body;
    static_assert(width * sizeof(T) <= 16, "the widest access has 16 bytes");
    static_assert(group % (width * vectors) == 0, "a thread's channels belong to one group");

    static constexpr Dcnv3Choice choice() { return {dtype_of<T>(), width, vectors, group, softmax, body}; }
};

// The released models have groups of 16 channels, InternImage-H and -G of 32, and export-onnx leaves the softmax to the
// operator: the variants for tuning are compiled for that alone.
template <typename T>
struct VariantsOf<Dcnv3Params, T> {
    template <int width, int vectors, int group, bool softmax, Body body = Body::kBranching>
    using V = Dcnv3Variant<T, width, vectors, group, softmax, body>;
    static constexpr int kWidest = 16 / sizeof(T);

    template <Body body>
    using Tuned = VariantList<V<kWidest, 1, 16, true, body>, V<kWidest, 2, 16, true, body>,
                              V<kWidest, 1, 32, true, body>, V<kWidest, 2, 32, true, body>>;
    using Plain = VariantList<V<kWidest, 1, 16, false>, V<kWidest, 2, 16, false>, V<kWidest, 1, 32, false>,
                              V<kWidest, 2, 32, false>>;
    using Any = VariantList<V<4, 1, 0, false>, V<2, 1, 0, false>, V<1, 1, 0, false>>;
    // For 16-bit types: a whole group of 32 channels, and eight channels of any group.
    template <Body body>
    using WholeGroup = std::conditional_t<sizeof(T) == 2, VariantList<V<kWidest, 4, 32, true, body>>, VariantList<>>;
    using Widest = std::conditional_t<sizeof(T) == 2, VariantList<V<kWidest, 1, 0, false>>, VariantList<>>;
    using Halves = std::conditional_t<std::is_same_v<T, Half>,
                                      decltype(Tuned<Body::kHalf>{} + WholeGroup<Body::kHalf>{}), VariantList<>>;

    using List = decltype(Tuned<Body::kBranching>{} + WholeGroup<Body::kBranching>{} + Tuned<Body::kBranchFree>{} +
                          WholeGroup<Body::kBranchFree>{} + Halves{} + Plain{} + Widest{} + Any{});
};

// A launch, and what is computed once for it.
struct Dcnv3Geometry {
    Grid grid;
    float reach_h;  // dilation * offset_scale
    float reach_w;
};

inline const Grid& grid_of(const Dcnv3Geometry& geometry) { return geometry.grid; }

// The variant for these parameters. The configuration's vectors and body are wishes, granted where such a kernel
// exists.
Dcnv3Choice choose_variant(const Dcnv3Params& p, DType dtype, const LaunchConfig& config);

Dcnv3Geometry make_geometry(const Dcnv3Params& p, const Dcnv3Choice& choice, const LaunchConfig& config);

int64_t output_bytes(const Dcnv3Params& p, DType dtype);

// nullptr, or why the kernel cannot run these parameters.
const char* parameter_error(const Dcnv3Params& p, DType dtype);

}  // namespace internimage
