// SPDX-License-Identifier: Apache-2.0
// UpsampleArgmax for one thread: logits interpolated to four times their height and width (bilinear, half-pixel
// centres, borders repeated), and the class with the largest one for each label. The lowest of equal classes wins; a
// NaN never does.
//
// Label position p lies at (p + 0.5) / 4 - 0.5 among the logits. Positions 4i - 2 to 4i + 1 therefore lie between logit
// i - 1 and logit i, at 1/8, 3/8, 5/8 and 7/8 of the way: a thread takes four such columns, which read the same four
// logits of a class, and one or four such rows. Nothing of full size but the labels is ever written.
#pragma once

#include <cmath>

#include "upsample_argmax_variants.h"

namespace internimage {

struct LabelPair {
    int32_t label[2];
};

// How far position `phase` of four lies between its two logits.
KERNEL_HD float way(int32_t phase) { return static_cast<float>(2 * phase + 1) * 0.125f; }

// a where both are equal, so that repeating a border logit changes nothing.
KERNEL_HD float between(float a, float b, float fraction) { return fmaf(fraction, b - a, a); }

// The work of thread (x, y, z) of block `block`.
template <typename V>
KERNEL_HD void run_thread(V, const UpsampleArgmaxParams& p, const Grid& grid, uint32_t block, int32_t x, int32_t y,
                          int32_t z) {
    using T = typename V::Scalar;
    constexpr int kRows = V::kRows;
    constexpr int kColumns = kUpsampleFactor;
    const Position at = grid.position(block, x, y, z);
    const int32_t rows = p.height * kUpsampleFactor;
    const int32_t columns = p.width * kUpsampleFactor;
    const int32_t first_row = kRows == 1 ? at.row : at.row * kUpsampleFactor - 2;
    if (at.step > 0 || at.column > p.width || first_row >= rows) return;
    // The logits below and right of the labels; those above and left come before, and there are none beyond borders.
    const int32_t below = (first_row + 2) / kUpsampleFactor;
    const int32_t right = at.column;
    const int32_t row_bottom = (below < p.height ? below : p.height - 1) * p.width;
    const int32_t row_top = (below > 0 ? below - 1 : 0) * p.width;
    const int32_t column_right = right < p.width ? right : p.width - 1;
    const int32_t column_left = right > 0 ? right - 1 : 0;
    const int32_t plane = p.height * p.width;
    const T* logits = static_cast<const T*>(p.logits) + int64_t{at.image} * p.classes * plane;
    const auto read = [&](int32_t index) { return only(load<Pack<T, 1>>(logits + index)); };

    float best[kRows][kColumns];
    int32_t labels[kRows][kColumns];
    KERNEL_UNROLL
    for (int r = 0; r < kRows; ++r) {
        KERNEL_UNROLL
        for (int c = 0; c < kColumns; ++c) {
            best[r][c] = -INFINITY;
            labels[r][c] = 0;
        }
    }
    for (int32_t k = 0; k < p.classes; ++k, logits += plane) {
        const float top_left = read(row_top + column_left);
        const float top_right = read(row_top + column_right);
        const float bottom_left = read(row_bottom + column_left);
        const float bottom_right = read(row_bottom + column_right);
        KERNEL_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const float down = way(kRows == 1 ? (first_row + 2) % kUpsampleFactor : r);
            const float left = between(top_left, bottom_left, down);
            const float step = between(top_right, bottom_right, down) - left;
            KERNEL_UNROLL
            for (int c = 0; c < kColumns; ++c) {
                const float value = fmaf(way(c), step, left);
                const bool better = value > best[r][c];
                best[r][c] = better ? value : best[r][c];
                labels[r][c] = better ? k : labels[r][c];
            }
        }
    }

    KERNEL_UNROLL
    for (int r = 0; r < kRows; ++r) {
        const int32_t row = first_row + r;
        if (row < 0 || row >= rows) continue;
        int32_t* out = p.labels + (int64_t{at.image} * rows + row) * columns + right * kUpsampleFactor - 2;
        if (right > 0) store(out, LabelPair{{labels[r][0], labels[r][1]}});
        if (right < p.width) store(out + 2, LabelPair{{labels[r][2], labels[r][3]}});
    }
}

}  // namespace internimage
