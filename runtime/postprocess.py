# SPDX-License-Identifier: Apache-2.0
"""From the network's answer to labels at the picture's own size, equal to mmsegmentation's.

Logits grow bilinearly (half-pixel centres) to the network's size, then to the picture's, then the largest class wins.
Both steps are linear and separable, so they are one product with a matrix on each side; and the result is a weighted
mean of neighbours, so a class whose largest neighbour lies below another class's smallest one cannot win. The work is
therefore done tile by tile, for the few classes that can win there, and never needs classes x pixels of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.preprocess import Geometry

# Side of a tile in cells of the logits: small enough that few classes compete in it, large enough that the loop over
# tiles costs little.
_TILE_CELLS = 16

Labels = npt.NDArray[np.uint8] | npt.NDArray[np.int32]


def label_dtype(classes: int) -> type[np.uint8] | type[np.int32]:
    """The smallest of the two label types that holds `classes` ids."""
    return np.uint8 if classes <= 256 else np.int32


@lru_cache(maxsize=64)
def interpolation_matrix(source: int, target: int) -> npt.NDArray[np.float64]:
    """(target, source) weights of bilinear resizing along one side: half-pixel centres, edges repeated."""
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0)
    low = np.minimum(position.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    fraction = position - low
    matrix = np.zeros((target, source))
    rows = np.arange(target)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


def labels_from_logits(logits: npt.NDArray[Any], geometry: Geometry) -> Labels:
    """Labels (H, W) at the picture's size from the decode head's `logits` (classes, h, w), any float type.

    Raises:
        UserError: the logits hold NaN or infinity.
    """
    logits = np.ascontiguousarray(logits, np.float32)
    if not np.isfinite(logits).all():
        raise UserError(
            "the network answered NaN or infinity; if the model is float16, export or build it in float32 or bfloat16"
        )
    classes, low_height, low_width = logits.shape
    vertical = _two_steps(low_height, geometry.network[0], geometry.content[0], geometry.image[0])
    horizontal = _two_steps(low_width, geometry.network[1], geometry.content[1], geometry.image[1])
    labels = np.empty(geometry.image, label_dtype(classes))
    columns = _tiles(horizontal)
    for row_out, row_in, row_weights in _tiles(vertical):
        band = logits[:, row_in]
        for column_out, column_in, column_weights in columns:
            cells = band[:, :, column_in]
            labels[row_out, column_out] = _tile_labels(cells, row_weights, column_weights)
    return labels


def labels_from_labels(labels: npt.NDArray[Any], geometry: Geometry, classes: int) -> Labels:
    """Labels (H, W) at the picture's size from `labels` (h, w) at network size: filling cut off, then nearest."""
    height, width = geometry.content
    rows = ((np.arange(geometry.image[0]) + 0.5) * (height / geometry.image[0])).astype(np.int64)
    columns = ((np.arange(geometry.image[1]) + 0.5) * (width / geometry.image[1])).astype(np.int64)
    inside = labels[:height, :width].astype(label_dtype(classes), copy=False)
    return np.take(np.take(inside, rows, axis=0), columns, axis=1)


def labels_from_planes(plane: Callable[[int], npt.NDArray[np.float32]], classes: int, geometry: Geometry) -> Labels:
    """Labels (H, W) at the picture's size where `plane(c)` gives class c's scores at network size (h, w).

    One class at a time, for scores that are costly to hold for all classes.
    """
    import cv2

    height, width = geometry.image
    labels = np.zeros((height, width), label_dtype(classes))
    best = np.full((height, width), -np.inf, np.float32)
    for index in range(classes):
        inside = plane(index)[: geometry.content[0], : geometry.content[1]]
        scores = cv2.resize(np.ascontiguousarray(inside), (width, height), interpolation=cv2.INTER_LINEAR)
        higher = scores > best
        labels[higher] = index
        np.copyto(best, scores, where=higher)
    return labels


@lru_cache(maxsize=64)
def _two_steps(logits: int, network: int, content: int, image: int) -> npt.NDArray[np.float32]:
    """(image, logits) weights of growing to the network's size, cutting to the content, and resizing to the picture."""
    grow = interpolation_matrix(logits, network)[:content]
    weights = grow if content == image else interpolation_matrix(content, image) @ grow
    return weights.astype(np.float32)


def _tiles(weights: npt.NDArray[np.float32]) -> list[tuple[slice, slice, npt.NDArray[np.float32]]]:
    """Cut (image, logits) weights into tiles: (pixels, cells they depend on, weights between them)."""
    pixels, cells = weights.shape
    step = max(pixels * _TILE_CELLS // cells, 16)
    tiles = []
    for start in range(0, pixels, step):
        part = weights[start : start + step]
        used = np.flatnonzero(part.any(axis=0))
        needed = slice(int(used[0]), int(used[-1]) + 1)
        tiles.append((slice(start, start + len(part)), needed, np.ascontiguousarray(part[:, needed])))
    return tiles


def _tile_labels(
    cells: npt.NDArray[np.float32], rows: npt.NDArray[np.float32], columns: npt.NDArray[np.float32]
) -> npt.NDArray[Any] | int:
    """Labels of one tile; `cells` (classes, h, w), `rows` (H, h), `columns` (W, w)."""
    highest = cells.max(axis=(1, 2))
    floor = cells.min(axis=(1, 2)).max()
    # The margin covers rounding in the products below; a class that stays in without need costs time, no exactness.
    candidates = np.flatnonzero(highest >= floor - 1e-4 * (1 + abs(floor)))
    if len(candidates) == 1:
        return int(candidates[0])
    best = rows @ cells[candidates[0]] @ columns.T
    labels = np.full(best.shape, candidates[0])
    for candidate in candidates[1:]:
        scores = rows @ cells[candidate] @ columns.T
        higher = scores > best
        labels[higher] = candidate
        np.maximum(best, scores, out=best)
    return labels
