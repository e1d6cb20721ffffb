# SPDX-License-Identifier: Apache-2.0
"""Pictures out of request bodies, and answers as PNG and run lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.image_io import decode_image, image_size
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.http_error import Refusal

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What clients may send: what browsers and cameras make, and no format whose decoder is rarely used by others."""

MOST_RUNS = 2_000_000  # of run-length masks; about 10 MB of JSON


def picture_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) as the header says. Refuses what is no picture with 400, what has too many pixels with 413."""
    try:
        width, height = image_size(data, what="the body", formats=FORMATS)
    except UserError as error:
        raise Refusal(400, str(error), kind="picture") from error
    if width * height > max_pixels:
        raise Refusal(
            413, f"the picture is {width}x{height}, {width * height:,} pixels; at most {max_pixels:,}", kind="pixels"
        )
    return width, height


def decode(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a picture whose size is known to be good; refuses with 400."""
    try:
        return decode_image(data, what="the picture", max_pixels=max_pixels, formats=FORMATS)
    except UserError as error:
        raise Refusal(400, str(error), kind="picture") from error


def png(image: npt.NDArray[Any]) -> bytes:
    """Labels (H, W), 8-bit where they fit and else 16-bit, or a picture (H, W, 3) uint8 RGB, as a PNG file."""
    import cv2

    if image.ndim == 3:
        image = np.ascontiguousarray(image[:, :, ::-1])
    elif image.dtype != np.uint8:
        image = image.astype(np.uint16)
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    if not done:
        raise RuntimeError(f"no PNG of {image.dtype} {image.shape}")
    return bytes(data)


def run_lengths(labels: Labels) -> dict[int, list[int]]:
    """COCO's uncompressed run lengths of each class that occurs in `labels` (H, W).

    Down the columns, left to right: pixels outside the class, inside, outside, ...; they sum to H * W.

    Raises:
        Refusal: 406, the labels change so often that the lists would be larger than a PNG.
    """
    column_first = np.asarray(labels).T.ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(column_first)) + 1])
    if len(starts) > MOST_RUNS:
        raise Refusal(
            406, "too many small regions for run lengths; ask for the labels with  Accept: image/png", kind="runs"
        )
    ends = np.append(starts[1:], column_first.size)
    values = column_first[starts]
    order = np.argsort(values, kind="stable")
    masks: dict[int, list[int]] = {}
    for part in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
        edges = np.empty(2 * len(part) + 1, np.int64)
        edges[0], edges[1::2], edges[2::2] = 0, starts[part], ends[part]
        counts = np.diff(edges).tolist()
        rest = column_first.size - int(ends[part[-1]])
        masks[int(values[part[0]])] = [*counts, rest] if rest else counts
    return masks
