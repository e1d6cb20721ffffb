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

# Side of a tile, in cells of the logits and at most in pixels: small enough that few classes compete in it and that
# BLAS does a product in one thread (waking the others costs more than the product), large enough for Python's loop.
_TILE_CELLS = 16
_TILE_PIXELS = 96

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
    possible = _possible_winners(logits)
    labels = np.empty(geometry.image, label_dtype(classes))
    columns = _tiles(horizontal)
    for row_out, row_in, row_weights in _tiles(vertical):
        for column_out, column_in, column_weights in columns:
            candidates = np.flatnonzero(possible[:, row_in, column_in].any(axis=(1, 2)))
            if len(candidates) == 1:
                labels[row_out, column_out] = candidates[0]
                continue
            scores = np.matmul(np.matmul(row_weights, logits[candidates, row_in, column_in]), column_weights.T)
            labels[row_out, column_out] = _winners(scores, candidates)
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
    step = min(max(pixels * _TILE_CELLS // cells, 16), _TILE_PIXELS)
    tiles = []
    for start in range(0, pixels, step):
        part = weights[start : start + step]
        used = np.flatnonzero(part.any(axis=0))
        needed = slice(int(used[0]), int(used[-1]) + 1)
        tiles.append((slice(start, start + len(part)), needed, np.ascontiguousarray(part[:, needed])))
    return tiles


def _possible_winners(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(classes, h, w): could the class win at a pixel made of that cell and its neighbours?

    A pixel is made of two pixels at network size, and these of two cells each: three cells in a row at most.
    """
    import cv2

    around = np.ones((3, 3), np.uint8)
    highest = np.stack([cv2.dilate(plane, around) for plane in logits])
    floor = np.stack([cv2.erode(plane, around) for plane in logits]).max(axis=0)
    # The margin covers rounding in the products; a class that stays in without need costs time, no exactness.
    possible: npt.NDArray[np.bool_] = highest >= floor - 1e-4 * (1 + np.abs(floor))
    return possible


def _winners(scores: npt.NDArray[np.float32], candidates: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """The candidate of the highest of `scores` (candidates, H, W) at each pixel, the first of equals."""
    best = scores[0]
    winners = np.full(best.shape, candidates[0], np.int32)
    for candidate, challenger in zip(candidates[1:], scores[1:], strict=True):
        np.copyto(winners, candidate, where=challenger > best)
        np.maximum(best, challenger, out=best)
    return winners
