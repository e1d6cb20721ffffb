# SPDX-License-Identifier: Apache-2.0
"""Encoding and decoding of images: request bodies to pixels, labels and overlays to PNG, labels to run lengths."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.image_io import decode_image, image_size
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.serving.http_error import HttpError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What clients may send: the formats of browsers and cameras, and none whose decoder is rarely used elsewhere."""

MAX_RUNS = 2_000_000  # of run-length masks; about 10 MB of JSON


def checked_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) from the header of an image file; nothing is decoded.

    Raises:
        HttpError: 400, not an image; 413, more than `max_pixels` pixels.
    """
    try:
        width, height = image_size(data, what="the body", formats=FORMATS)
    except UserError as error:
        raise HttpError(400, str(error), kind="picture") from error
    if width * height > max_pixels:
        raise HttpError(
            413, f"the image is {width}x{height}, {width * height:,} pixels; at most {max_pixels:,}", kind="pixels"
        )
    return width, height


def decode(data: bytes, max_pixels: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of an image file whose size was checked.

    Raises:
        HttpError: 400, the file is damaged.
    """
    try:
        return decode_image(data, what="the image", max_pixels=max_pixels, formats=FORMATS)
    except UserError as error:
        raise HttpError(400, str(error), kind="picture") from error


def run_lengths(labels: Labels) -> dict[int, list[int]]:
    """COCO's uncompressed run lengths of each class that occurs in `labels` (H, W).

    Down the columns, left to right: pixels outside the class, inside, outside, ...; they sum to H * W.

    Raises:
        HttpError: 406, the labels change so often that the lists would be larger than a PNG.
    """
    column_first = np.asarray(labels).T.ravel()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(column_first)) + 1])
    if len(starts) > MAX_RUNS:
        raise HttpError(
            406, "too many small regions for run lengths; ask for the labels with  Accept: image/png", kind="runs"
        )
    ends = np.append(starts[1:], column_first.size)
    values = column_first[starts]
    order = np.argsort(values, kind="stable")
    masks: dict[int, list[int]] = {}
    for runs in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
        edges = np.empty(2 * len(runs) + 1, np.int64)
        edges[0], edges[1::2], edges[2::2] = 0, starts[runs], ends[runs]
        counts = np.diff(edges).tolist()
        tail = column_first.size - int(ends[runs[-1]])
        masks[int(values[runs[0]])] = [*counts, tail] if tail else counts
    return masks
