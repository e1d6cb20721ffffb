# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation: an image is seen at several scales and mirrored, and the class probabilities are averaged.

As mmsegmentation's `MultiScaleFlipAug` and `aug_test` do it: the size that images are resized to is multiplied by each
scale and cut to whole pixels; the resized image is mirrored; each view's logits are upsampled to the image's own size;
their softmax is mirrored back; the mean over the views decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError

_MAX_SCALES, _MAX_SCALE = 16, 8.0


@dataclass(frozen=True)
class Augmentation:
    """Which views of an image the network sees.

    Attributes:
        scales: factors of the size that images are resized to.
        flip: see each of them mirrored left to right too.

    Raises:
        UserError: no scales, or one that is no number above 0 and up to 8.
    """

    scales: tuple[float, ...]
    flip: bool = False

    def __post_init__(self) -> None:
        fits = isinstance(self.scales, tuple) and 0 < len(self.scales) <= _MAX_SCALES
        if not fits or not all(_is_scale(scale) for scale in self.scales):
            raise UserError(
                f"scales is {self.scales!r}, expected up to {_MAX_SCALES} factors above 0 and up to {_MAX_SCALE:g}, "
                "such as (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)"
            )
        if not isinstance(self.flip, bool):
            raise UserError(f"flip is {self.flip!r}, expected True or False")

    @property
    def views(self) -> list[tuple[float, bool]]:
        """(scale, mirrored) of every view."""
        return [(scale, mirrored) for scale in self.scales for mirrored in (False, True)[: 1 + self.flip]]


def scaled_limit(resize: tuple[int, int] | None, image: tuple[int, int], scale: float) -> tuple[int, int] | None:
    """The `resize` (long, short) of a view; `image` (height, width) counts where images keep their own size."""
    if scale == 1.0:
        return resize
    long, short = resize or (max(image), min(image))
    return max(int(long * scale), 1), max(int(short * scale), 1)


def mirrored(pixels: npt.NDArray[np.uint8], content: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """(h, w, 3) with the part that shows the image, `content` (height, width), mirrored; the padding stays."""
    turned = pixels.copy()
    turned[: content[0], : content[1]] = pixels[: content[0], : content[1]][:, ::-1]
    return turned


def _is_scale(scale: object) -> bool:
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    return number and math.isfinite(scale) and 0 < scale <= _MAX_SCALE  # type: ignore[arg-type,operator]
