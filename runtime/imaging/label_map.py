# SPDX-License-Identifier: Apache-2.0
"""Label maps from files: one value for each pixel, as it is stored, in place of the colours that a viewer shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.image_io import opened

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
_MODES = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")  # Pillow's, of one channel of integers


def read_label_map(source: Path | bytes, name: str, size: tuple[int, int]) -> npt.NDArray[Any]:
    """The values (H, W) in a label map: grey, 8 or 16 bits, or the indices of a palette image.

    Args:
        source: the file, or its content.
        name: of the file, for errors.
        size: (height, width) of the image that it belongs to; another size is rejected before the file is decoded.

    Returns:
        (H, W) uint8, uint16 or int32.

    Raises:
        UserError: no image, a damaged one, several channels, fractional values, or another size.
    """
    with opened(source, name, _FORMATS) as (image, _):
        _check_mode(image, name)
        if (image.height, image.width) != size:
            raise UserError(
                f"{name}: {image.width}x{image.height}, its image is {size[1]}x{size[0]} pixels; expected a label map "
                "of the image's size"
            )
        values = np.asarray(image)
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def check_label_map(source: Path | bytes, name: str) -> None:
    """Check that a file is an image of one channel, without decoding it. Raises `UserError`."""
    with opened(source, name, _FORMATS) as (image, _):
        _check_mode(image, name)


def _check_mode(image: Image.Image, name: str) -> None:
    if image.mode not in _MODES:
        found = "fractional values" if image.mode == "F" else f"{len(image.getbands())} channels ({image.mode})"
        raise UserError(
            f"{name}: {found}, expected a label map of one channel: a grey or palette image whose values are ids"
        )
