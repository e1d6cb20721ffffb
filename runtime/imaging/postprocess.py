# SPDX-License-Identifier: Apache-2.0
"""From the network's output to labels at the image's own size, equal to mmsegmentation's.

Logits are upsampled bilinearly (half-pixel centres) to the network's size, then resized to the image's, and the class
with the largest value wins.
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

from internimage_deploy.card import label_dtype
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.preprocess import Geometry

# Side of a tile, in cells of the logits and at most in pixels: small enough that few classes compete in it and that
# BLAS does a product in one thread (waking the others costs more than the product), large enough for Python's loop.
_TILE_CELLS = 16
_TILE_PIXELS = 96

Labels = npt.NDArray[np.uint8 | np.int32]
Plane = Callable[[int], npt.NDArray[np.float32]]
"""From a class id to that class's logits at network size (h, w)."""


def labels_from_logits(logits: npt.NDArray[Any], geometry: Geometry) -> Labels:
    """Labels (H, W) at the image's size from the decode head's `logits` (classes, h, w), any float type.

    Raises:
        UserError: the logits hold NaN or infinity.
    """
    logits = np.ascontiguousarray(logits, np.float32)
    _check_finite(logits)
    classes, low_height, low_width = logits.shape
    rows = _tiles(low_height, geometry.network[0], geometry.content[0], geometry.image[0])
    columns = _tiles(low_width, geometry.network[1], geometry.content[1], geometry.image[1])
    possible = _possible_winners(logits)
    labels = np.empty(geometry.image, label_dtype(classes))
    for row_out, row_in, row_weights in rows:
        for column_out, column_in, column_weights in columns:
            candidates = np.flatnonzero(possible[:, row_in, column_in].any(axis=(1, 2)))
            if len(candidates) == 1:
                labels[row_out, column_out] = candidates[0]
                continue
            scores = np.matmul(np.matmul(row_weights, logits[candidates, row_in, column_in]), column_weights.T)
            labels[row_out, column_out] = _winners(scores, candidates)
    return labels


def labels_from_labels(labels: npt.NDArray[Any], geometry: Geometry, classes: int) -> Labels:
    """Labels (H, W) at the image's size from `labels` (h, w) at network size: padding cut off, then nearest."""
    height, width = geometry.content
    rows = ((np.arange(geometry.image[0]) + 0.5) * (height / geometry.image[0])).astype(np.int64)
    columns = ((np.arange(geometry.image[1]) + 0.5) * (width / geometry.image[1])).astype(np.int64)
    inside = labels[:height, :width].astype(label_dtype(classes), copy=False)
    return np.take(np.take(inside, rows, axis=0), columns, axis=1)


def labels_from_planes(plane: Plane, classes: int, geometry: Geometry) -> Labels:
    """Labels (H, W) at the image's size where `plane(c)` gives class c's logits at network size (h, w).

    One class at a time, for logits that are costly to hold for all classes.

    Raises:
        UserError: the logits hold NaN or infinity.
    """
    labels = np.zeros(geometry.image, label_dtype(classes))
    best = np.full(geometry.image, -np.inf, np.float32)
    for index in range(classes):
        scores = _at_image_size(plane(index), geometry)
        higher = scores > best
        labels[higher] = index
        np.copyto(best, scores, where=higher)
    return labels


def labels_from_probabilities(probabilities: npt.NDArray[np.float32]) -> Labels:
    """Labels (H, W) of the highest of `probabilities` (classes, H, W), the first of equals."""
    return probabilities.argmax(0).astype(label_dtype(len(probabilities)))


def probabilities_from_planes(plane: Plane, classes: int, geometry: Geometry) -> npt.NDArray[np.float32]:
    """Softmax over the classes at the image's size (classes, H, W); `plane` as in `labels_from_planes`.

    Raises:
        UserError: the logits hold NaN or infinity.
    """
    scores = np.empty((classes, *geometry.image), np.float32)
    for index in range(classes):
        scores[index] = _at_image_size(plane(index), geometry)
    scores -= scores.max(0)
    np.exp(scores, out=scores)
    scores /= scores.sum(0)
    return scores


def planes_of_logits(logits: npt.NDArray[Any], geometry: Geometry) -> Plane:
    """The `plane` of `labels_from_planes` for the decode head's `logits` (classes, h, w)."""
    import cv2

    height, width = geometry.network
    return lambda index: np.asarray(
        cv2.resize(logits[index].astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR), np.float32
    )


def _at_image_size(plane: npt.NDArray[np.float32], geometry: Geometry) -> npt.NDArray[np.float32]:
    """A class's logits at network size (h, w) without the padding, resized to the image's size."""
    import cv2

    inside = plane[: geometry.content[0], : geometry.content[1]]
    _check_finite(inside)
    size = (geometry.image[1], geometry.image[0])
    return np.asarray(cv2.resize(np.ascontiguousarray(inside), size, interpolation=cv2.INTER_LINEAR), np.float32)


def _check_finite(scores: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(scores).all():
        raise UserError(
            "the network produced NaN or infinity; if the model is float16, export or build it in float32 or bfloat16"
        )


def _band(source: int, target: int, start: int, stop: int) -> tuple[int, npt.NDArray[np.float64]]:
    """Rows `start` to `stop` of the interpolation matrix: the first column they use, and their weights from there."""
    position = np.maximum((np.arange(start, stop) + 0.5) * (source / target) - 0.5, 0)
    low = np.minimum(position.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    fraction, first = position - low, int(low[0])
    weights = np.zeros((stop - start, int(high[-1]) + 1 - first))
    rows = np.arange(stop - start)
    np.add.at(weights, (rows, low - first), 1 - fraction)
    np.add.at(weights, (rows, high - first), fraction)
    return first, weights


@lru_cache(maxsize=64)
def _tiles(
    cells: int, network: int, content: int, image: int
) -> tuple[tuple[slice, slice, npt.NDArray[np.float32]], ...]:
    """Tiles along one side: (pixels, cells they depend on, weights between them).

    The weights are those of upsampling `cells` to `network`, cropping to `content`, and resizing to `image`, made
    tile by tile: the whole matrix would need image x cells numbers, more than a machine has for a very long image.
    """
    step = min(max(image * _TILE_CELLS // cells, 16), _TILE_PIXELS)
    tiles = []
    for start in range(0, image, step):
        stop = min(start + step, image)
        if content == image:
            first, weights = _band(cells, network, start, stop)
        else:
            row, resize = _band(content, image, start, stop)
            first, upsample = _band(cells, network, row, row + resize.shape[1])
            weights = resize @ upsample
        used = np.flatnonzero(weights.any(axis=0))
        needed = slice(first + int(used[0]), first + int(used[-1]) + 1)
        part = np.ascontiguousarray(weights[:, used[0] : used[-1] + 1], np.float32)
        tiles.append((slice(start, stop), needed, part))
    return tuple(tiles)


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
