// SPDX-License-Identifier: Apache-2.0
#include "grid.h"

#include <algorithm>

namespace internimage {
namespace {

Divisor make_divisor(int64_t value) {
    Divisor d{static_cast<uint32_t>(value), 0, 0};
    if (value > 1) {
        // Granlund and Montgomery: multiplier = ceil(2^(31 + s) / value) with 2^(s-1) < value <= 2^s is exact below
        // 2^31.
        uint32_t s = 0;
        while ((int64_t{1} << s) < value) ++s;
        d.multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + s)) + value - 1) / value);
        d.shift = s - 1;
    }
    return d;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

LaunchConfig default_config(int64_t output_bytes, int32_t multiprocessors) {
    const int64_t threads = output_bytes / 16;
    // A multiprocessor holds 1024 to 2048 threads. With several waves of them, two vectors per thread save address
    // arithmetic; with less than one, threads are what hides the latency of memory.
    const int64_t wave = int64_t{multiprocessors} * 1536;
    if (threads < wave) return {64, 1, 1};
    if (threads < 4 * wave) return {128, 1, 4};
    return {256, 2, 4};
}

Grid make_grid(const Extent& extent, const LaunchConfig& config) {
    const int64_t chunks = ceil_div(extent.steps, config.threads);
    Grid g{};
    g.block_x = static_cast<int32_t>(ceil_div(extent.steps, chunks));
    const int32_t pixels = config.threads / g.block_x;
    g.block_z = static_cast<int32_t>(std::min<int64_t>({config.tile_rows, pixels, extent.rows}));
    g.block_y = static_cast<int32_t>(std::min<int64_t>(pixels / g.block_z, extent.columns));
    // An image narrower than the tile leaves threads over: they take further rows.
    g.block_z = static_cast<int32_t>(std::min<int64_t>(pixels / g.block_y, extent.rows));
    const int64_t tiles_w = ceil_div(extent.columns, g.block_y);
    const int64_t tiles_h = ceil_div(extent.rows, g.block_z);
    g.chunks = make_divisor(chunks);
    g.tiles_w = make_divisor(tiles_w);
    g.tiles_h = make_divisor(tiles_h);
    g.blocks = chunks * tiles_w * tiles_h * extent.images;
    return g;
}

}  // namespace internimage
