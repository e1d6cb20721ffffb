# SPDX-License-Identifier: Apache-2.0
"""Sliding-window inference: the network sees one crop after another, and overlapping logits are averaged.

Crops, order and average are mmsegmentation's: a grid of `stride` from the upper left, the last row and column moved
back to end at the border; every crop's logits are upsampled to the crop's size before they are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.runtime.imaging.postprocess import Plane
from internimage_deploy.runtime.imaging.preprocess import Geometry
from internimage_deploy.window import Window


def crops(size: tuple[int, int], window: Window) -> list[tuple[slice, slice]]:
    """(rows, columns) of every crop over `size` (height, width); each is the crop's size, or the image's if less."""
    height, width = (_starts(*sides) for sides in zip(size, window.crop, window.stride, strict=True))
    return [
        (slice(y, min(y + window.crop[0], size[0])), slice(x, min(x + window.crop[1], size[1])))
        for y in height
        for x in width
    ]


def crop_count(size: tuple[int, int], window: Window) -> int:
    """How many crops there are over `size` (height, width): the length of `crops`."""
    return math.prod(_steps(*sides) for sides in zip(size, window.crop, window.stride, strict=True))


def planes_of_crops(
    logits: Sequence[npt.NDArray[Any]], places: Sequence[tuple[slice, slice]], geometry: Geometry
) -> Plane:
    """From a class id to its averaged logits at network size (h, w), from the `logits` (classes, h, w) of the crops."""
    import cv2

    count = np.zeros(geometry.network, np.float32)
    for place in places:
        count[place] += 1

    def plane(index: int) -> npt.NDArray[np.float32]:
        total = np.zeros(geometry.network, np.float32)
        for crop, (rows, columns) in zip(logits, places, strict=True):
            size = (columns.stop - columns.start, rows.stop - rows.start)
            total[rows, columns] += cv2.resize(crop[index].astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        total /= count
        return total

    return plane


def _starts(size: int, crop: int, stride: int) -> list[int]:
    return [max(min(step * stride, size - crop), 0) for step in range(_steps(size, crop, stride))]


def _steps(size: int, crop: int, stride: int) -> int:
    return max(size - crop + stride - 1, 0) // stride + 1
