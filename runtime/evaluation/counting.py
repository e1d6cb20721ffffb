# SPDX-License-Identifier: Apache-2.0
"""Counting pixels by true and predicted class, image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.runtime.evaluation.truth import Truth
from internimage_deploy.runtime.imaging.pipeline import PreparedImage
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.pipelines.files import Outcome
from internimage_deploy.runtime.pipelines.find import ImageFile
from internimage_deploy.runtime.segmenter import Segmenter

_CHUNK = 1 << 20  # pixels that are counted at once: bincount takes 8 bytes for each

OnLabels = Callable[[ImageFile, Labels], None]


class Counter:
    """Counts the labels of each image against its label map; a `Writer` for `segment_files`.

    Args:
        truth: the label maps.
        on_labels: called with each image's labels (H, W), from several threads; may raise `UserError`.
    """

    def __init__(self, truth: Truth, on_labels: OnLabels | None = None) -> None:
        self._truth = truth
        self._storage = truth.folder.open()
        self._on_labels = on_labels

    def write(
        self, image: ImageFile, segmenter: Segmenter, prepared: PreparedImage, output: npt.NDArray[Any]
    ) -> Outcome:
        """Count one image. Raises `UserError`."""
        height, width = prepared.image.shape[:2]
        truth = self._truth.read(self._storage, image.stem, (height, width))
        labels = segmenter.finish(prepared, output).labels
        counts = count_pairs(truth, labels, self._truth.classes, len(segmenter.card.classes))
        if self._on_labels is not None:
            self._on_labels(image, labels)
        occurring = np.argwhere(counts)
        return Outcome(counts=[(int(true), int(found), int(counts[true, found])) for true, found in occurring])


def count_pairs(
    truth: npt.NDArray[np.int32], labels: npt.NDArray[Any], classes: int, predicted: int
) -> npt.NDArray[np.int64]:
    """(classes + 1, predicted) int64: pixels by `truth` (H, W), from 0 to `classes`, and `labels` (H, W)."""
    counts = np.zeros((classes + 1) * predicted, np.int64)
    rows = max(_CHUNK // truth.shape[1], 1)
    for start in range(0, len(truth), rows):
        part = slice(start, start + rows)
        pairs = truth[part].astype(np.int64) * predicted + labels[part]
        counts += np.bincount(pairs.ravel(), minlength=len(counts))
    return counts.reshape(classes + 1, predicted)
