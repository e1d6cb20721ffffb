# SPDX-License-Identifier: Apache-2.0
"""The files that a segmented image becomes: their names and their formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LABELS = ".labels.png"
"""Ending of the label map. It is written last, so its presence says that an image is done."""
OVERLAY = ".overlay.png"
JSON = ".json"
OVERLAY_VIDEO = ".overlay.mp4"
FAILURES = "failures.jsonl"
"""One line {"source", "error"} for each image that failed; beside the results, and only where there is one."""


@dataclass(frozen=True)
class ResultOptions:
    """Which files are written beside the label map."""

    overlay: bool = False
    as_json: bool = False


def is_result(name: str) -> bool:
    """True for the name of a result that could be taken for an image to segment."""
    return name.lower().endswith((LABELS, OVERLAY))


def png(image: npt.NDArray[Any]) -> bytes:
    """A PNG file of labels (H, W), 8-bit where they fit and else 16-bit, or of an image (H, W, 3) uint8 RGB."""
    import cv2

    if image.ndim == 3:
        image = np.ascontiguousarray(image[:, :, ::-1])
    elif image.dtype != np.uint8:
        image = image.astype(np.uint16)
    encoded, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not encoded:
        raise RuntimeError(f"OpenCV could not encode {image.dtype} {image.shape} as PNG")
    return bytes(data)
