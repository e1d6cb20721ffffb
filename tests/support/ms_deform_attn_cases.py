# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention: operands of any size, and what it is by its definition, in plain NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from support import golden

NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Rounding of the stored output; inside, everything is float32.
UNIT = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def draw(seed, *, batch=1, shapes=((3, 5),), queries=7, heads=2, channels=8, points=4, spread=0.3):
    """Random operands, float32 and int64: locations lie around the maps, some of them outside."""
    rng = np.random.default_rng(seed)
    shapes = np.array(shapes, np.int64)
    sizes = shapes.prod(1)
    value = rng.standard_normal((batch, sizes.sum(), heads, channels), np.float32)
    places = (batch, queries, heads, len(shapes), points)
    locations = (0.5 + spread * rng.standard_normal((*places, 2))).astype(np.float32)
    weights = np.exp(rng.standard_normal(places, np.float32))
    weights /= weights.sum((-2, -1), keepdims=True)
    return value, shapes, np.cumsum(sizes) - sizes, locations, weights


def stored(operands, dtype):
    """The operands with values and weights rounded to `dtype`."""
    value, shapes, starts, locations, weights = operands
    return value.astype(NUMPY[dtype]), shapes, starts, locations, weights.astype(NUMPY[dtype])


def reference(value, shapes, starts, locations, weights):
    """The definition, in float64: (N, Q, M*D). Levels that do not lie inside `value` and wild locations read zero."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        value, locations, weights = (np.asarray(a, np.float64) for a in (value, locations, weights))
    batch, keys, heads, channels = value.shape
    queries = locations.shape[1]
    total = np.zeros((batch, queries, heads, channels))
    image = np.arange(batch)[:, None, None, None]
    head = np.arange(heads)[None, None, :, None]
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        if not (height > 0 and width > 0 and 0 <= start <= keys - height * width):
            continue
        map_ = value[:, start : start + height * width].reshape(batch, height, width, heads, channels)
        at = locations[:, :, :, level]
        wild = ~(np.abs(at) < 1e9)
        x, y = (np.where(wild[..., i], -9.0, at[..., i]) * side - 0.5 for i, side in enumerate((width, height)))
        column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        for dy in (0, 1):
            for dx in (0, 1):
                share = (1 - np.abs(y - row - dy)) * (1 - np.abs(x - column - dx)) * weights[:, :, :, level]
                inside = (row + dy >= 0) & (row + dy < height) & (column + dx >= 0) & (column + dx < width)
                taken = map_[image, np.clip(row + dy, 0, height - 1), np.clip(column + dx, 0, width - 1), head]
                total += (np.where(inside, share, 0)[..., None] * np.where(inside[..., None], taken, 0)).sum(3)
    return total.reshape(batch, queries, heads * channels)


def golden_case(name):
    """The operands and the output of a golden case."""
    arrays = golden.arrays("msda_op")
    parts = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights", "output")
    *operands, output = (arrays[f"{name}.{part}"] for part in parts)
    return tuple(operands), output


GOLDEN = tuple(golden.case("msda_op"))
