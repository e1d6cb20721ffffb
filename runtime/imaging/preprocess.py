# SPDX-License-Identifier: Apache-2.0
"""From an image to the network's input, as mmsegmentation's test pipeline does it.

Free network size: resize keeping the ratio so that the image fits (long, short), then resize up to multiples of the
size divisor; both steps bilinear on uint8. Fixed network size: resize keeping the ratio so that the image fits
inside, then pad the right and bottom with the mean colour; labels are cropped before they are resized to the
image's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard


@dataclass(frozen=True)
class Geometry:
    """Sizes on the way into the network, each (height, width) in pixels.

    `content` is the part of the `network` input that shows the image, the part right of it and below is padding.
    """

    image: tuple[int, int]
    keep_ratio: tuple[int, int]
    content: tuple[int, int]
    network: tuple[int, int]


def keep_ratio_size(image: tuple[int, int], limit: tuple[int, int]) -> tuple[int, int]:
    """(height, width) after resizing `image` (height, width) to fit `limit` (long, short): mmcv's rule and rounding."""
    height, width = image
    scale = min(max(limit) / max(image), min(limit) / min(image))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def round_up(size: tuple[int, int], divisor: int) -> tuple[int, int]:
    """Both sides rounded up to multiples of `divisor`."""
    return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor


def free_geometry(image: tuple[int, int], resize: tuple[int, int] | None, divisor: int) -> Geometry:
    """Sizes for a network that takes any multiple of `divisor`; `resize` (long, short), None for the own size."""
    kept = image if resize is None else keep_ratio_size(image, resize)
    network = round_up(kept, divisor)
    return Geometry(image, kept, network, network)


def fixed_geometry(image: tuple[int, int], network: tuple[int, int]) -> Geometry:
    """Sizes for a network of one size: the largest keep-ratio copy of the image that fits inside."""
    scale = min(network[0] / image[0], network[1] / image[1])
    height, width = (min(max(int(side * scale + 0.5), 1), most) for side, most in zip(image, network, strict=True))
    return Geometry(image, (height, width), (height, width), network)


def resize_image(image: npt.NDArray[np.uint8], geometry: Geometry, mean: Sequence[float]) -> npt.NDArray[np.uint8]:
    """`image` (H, W, 3) uint8 brought to the network's size (h, w, 3) uint8, filled with `mean` where it ends."""
    resized = _resize(_resize(image, geometry.keep_ratio), geometry.content)
    if geometry.content == geometry.network:
        return resized
    canvas = np.empty((*geometry.network, 3), np.uint8)
    canvas[:] = np.rint(mean).astype(np.uint8)
    canvas[: geometry.content[0], : geometry.content[1]] = resized
    return canvas


def network_input(images: Sequence[npt.NDArray[np.uint8]], card: ModelCard) -> npt.NDArray[Any]:
    """Images of one size as the batch that the card describes.

    Args:
        images: each (H, W, 3) uint8 RGB, at network size.
        card: says whether the graph normalises by itself.

    Returns:
        (N, H, W, 3) uint8 if the network takes images, else (N, 3, H, W) float, normalised.
    """
    if card.takes_uint8:
        return np.stack(images)
    height, width = images[0].shape[:2]
    batch = np.empty((len(images), 3, height, width), np.float32)
    mean, scale = np.asarray(card.mean, np.float32), 1 / np.asarray(card.std, np.float64)
    for target, image in zip(batch, images, strict=True):
        for channel in range(3):
            np.subtract(image[:, :, channel], mean[channel], out=target[channel])
            target[channel] *= np.float32(scale[channel])
    return batch.astype(card.input.dtype, copy=False)


def _resize(image: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    import cv2

    if image.shape[:2] == size:
        return image
    return np.asarray(cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR), np.uint8)
