# SPDX-License-Identifier: Apache-2.0
"""Checks of image files before they are decoded, and labels as run lengths."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.imaging.scan import Buffer, Structure, check_structure
from internimage_deploy.runtime.serving.admission import Share
from internimage_deploy.runtime.serving.http_error import HttpError

MAX_RUNS = 2_000_000  # of run-length masks; about 10 MB of JSON
_MAX_PASSES = 8  # over an image of the most pixels; what takes more work holds a decoder for many seconds
_RUN_BYTES = 96  # of arrays on the way, and of JSON and its copies


def checked_structure(data: Buffer, max_pixels: int) -> Structure:
    """The structure of an image file, found without decoding it.

    Raises:
        HttpError: 400, a structure that is refused; 413, more than `max_pixels` pixels, or too much work for its size.
    """
    try:
        structure = check_structure(data, what="the body")
    except UserError as error:
        raise HttpError(400, str(error), kind="picture") from error
    width, height = structure.width, structure.height
    if width * height > max_pixels:
        raise HttpError(
            413, f"the image is {width}x{height}, {width * height:,} pixels; at most {max_pixels:,}", kind="pixels"
        )
    if structure.width and structure.work > _MAX_PASSES * max_pixels:
        raise HttpError(
            413, "the image takes too long to decode in this format; save it as a PNG or a plain JPEG", kind="pixels"
        )
    return structure


def run_lengths(labels: Labels, share: Share) -> dict[int, npt.NDArray[np.int64]]:
    """COCO's uncompressed run lengths of each class that occurs in `labels` (H, W).

    Down the columns, left to right: pixels outside the class, inside, outside, ...; they sum to H * W.

    Raises:
        HttpError: 406, the labels change so often that the lists would be larger than a PNG; 503, `share` cannot take
            what they need.
    """
    column_first = np.asarray(labels).T.ravel()
    changes = column_first[1:] != column_first[:-1]
    number = int(np.count_nonzero(changes)) + 1
    if number > MAX_RUNS:
        raise HttpError(
            406, "too many small regions for run lengths; ask for the labels with  Accept: image/png", kind="runs"
        )
    share.take(number * _RUN_BYTES)
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    ends = np.append(starts[1:], column_first.size)
    values = column_first[starts]
    order = np.argsort(values, kind="stable")
    masks: dict[int, npt.NDArray[np.int64]] = {}
    for runs in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
        edges = np.empty(2 * len(runs) + 1, np.int64)
        edges[0], edges[1::2], edges[2::2] = 0, starts[runs], ends[runs]
        counts = np.diff(edges)
        tail = column_first.size - int(ends[runs[-1]])
        masks[int(values[runs[0]])] = np.append(counts, tail) if tail else counts
    return masks
