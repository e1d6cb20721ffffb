# SPDX-License-Identifier: Apache-2.0
"""The files that a segmented image becomes: their names and their formats."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

LABELS = ".labels.png"
"""Ending of the label map. It is written last, so its presence says that an image is done."""
OVERLAY = ".overlay.png"
OVERLAY_JPEG = ".overlay.jpg"
JSON = ".json"
OVERLAY_VIDEO = ".overlay.mp4"
FRAMES_JSON = ".frames.jsonl"
"""One line for each frame of a video."""
FAILURES = "failures.jsonl"
"""One line {"source", "error"} for each image that failed; beside the results, and only where there is one."""

Mask = Literal["indexed", "ids", "color"]

MAX_JPEG_SIDE = 65535
_JPEG_QUALITY = 92
_PALETTE_SIZE = 256


@dataclass(frozen=True)
class ResultOptions:
    """Which files are written, and how.

    Attributes:
        overlay: write the image with its labels over it.
        as_json: write the classes with their pixels and fractions.
        mask: format of the label map: "indexed" is a palette PNG, whose pixel values are the ids and which viewers show
            in the classes' colours; "ids" is a grey PNG of the ids; "color" is an RGB PNG, without the ids.
        alpha: weight of the labels' colours in the overlay, 0 to 1.
        legend: list the classes that occur beside the overlay.
        overlay_format: of the overlay's file.
        classes: ids of the classes that the overlay and the JSON file show; None for all.
    """

    overlay: bool = False
    as_json: bool = False
    mask: Mask = "indexed"
    alpha: float = 0.5
    legend: bool = False
    overlay_format: Literal["png", "jpeg"] = "png"
    classes: tuple[int, ...] | None = None

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the files that each image becomes, in the order in which they are written."""
        overlay = OVERLAY_JPEG if self.overlay_format == "jpeg" else OVERLAY
        return (*([overlay] if self.overlay else []), *([JSON] if self.as_json else []), LABELS)


def is_result(name: str) -> bool:
    """True for the name of a result that could be taken for an image to segment."""
    return name.lower().endswith((LABELS, OVERLAY, OVERLAY_JPEG))


def png(image: npt.NDArray[Any]) -> bytes:
    """A PNG file of labels (H, W), 8-bit where they fit and else 16-bit, or of an image (H, W, 3) uint8 RGB."""
    if image.ndim == 2 and image.dtype != np.uint8:
        image = image.astype(np.uint16)
    return _encode(".png", image, [_cv2().IMWRITE_PNG_COMPRESSION, 3])


def jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    """A JPEG file of an image (H, W, 3) uint8 RGB."""
    return _encode(".jpg", image, [_cv2().IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])


def indexed_png(labels: npt.NDArray[Any], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """A palette PNG of labels (H, W) uint8, with a colour (R, G, B) for each id.

    Pillow, mmsegmentation and most others read the ids; OpenCV's `imread` reads the colours, whatever its flags. Labels
    that need more than 8 bits have no such format and become a 16-bit grey PNG of the ids.
    """
    from PIL import Image

    if labels.dtype != np.uint8 or len(palette) > _PALETTE_SIZE:
        return png(labels)
    image = Image.fromarray(np.ascontiguousarray(labels))
    # All 256 entries, for with fewer Pillow writes fewer than 8 bits a pixel.
    colors = [value for color in palette for value in color]
    image.putpalette(colors + [0] * (3 * _PALETTE_SIZE - len(colors)))
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _encode(ending: str, image: npt.NDArray[Any], settings: list[int]) -> bytes:
    if image.ndim == 3:
        image = np.ascontiguousarray(image[:, :, ::-1])
    encoded, data = _cv2().imencode(ending, image, settings)
    if not encoded:
        raise RuntimeError(f"OpenCV could not encode {image.dtype} {image.shape} as {ending}")
    return bytes(data)


def _cv2() -> Any:
    import cv2

    return cv2
