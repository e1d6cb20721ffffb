// SPDX-License-Identifier: Apache-2.0
// The compiled kernels of UpsampleArgmax, and which of them serves a call.
#pragma once

#include "upsample_argmax_params.h"
#include "variants.h"

namespace internimage {

// What selects a variant at run time.
struct UpsampleArgmaxChoice {
    DType dtype;
    int32_t rows;

    bool operator==(const UpsampleArgmaxChoice& o) const { return dtype == o.dtype && rows == o.rows; }
};

// A thread computes four labels side by side in each of `rows` rows, 1 or 4. Those between the same four logits share
// their loads: with four rows a label costs less, with one there are more threads.
template <typename T, int rows>
struct UpsampleArgmaxVariant {
    using Scalar = T;
    static constexpr int kRows = rows;

    static constexpr UpsampleArgmaxChoice choice() { return {dtype_of<T>(), rows}; }
};

template <typename T>
struct VariantsOf<UpsampleArgmaxParams, T> {
    using List = VariantList<UpsampleArgmaxVariant<T, 1>, UpsampleArgmaxVariant<T, kUpsampleFactor>>;
};

// The configuration's vectors say how many rows: 1 for one, more for four.
UpsampleArgmaxChoice choose_variant(const UpsampleArgmaxParams& p, DType dtype, const LaunchConfig& config);

// The grid's columns are groups of four labels, its rows those of a thread.
Grid make_geometry(const UpsampleArgmaxParams& p, const UpsampleArgmaxChoice& choice, const LaunchConfig& config);

int64_t output_bytes(const UpsampleArgmaxParams& p, DType dtype);

// nullptr, or why the kernel cannot run these parameters.
const char* parameter_error(const UpsampleArgmaxParams& p, DType dtype);

}  // namespace internimage
