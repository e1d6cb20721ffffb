# SPDX-License-Identifier: Apache-2.0
"""Intersection over union, counted over any number of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Score:
    """Counts of (true class, predicted class) over all pixels seen so far."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self.counts = np.zeros((len(classes), len(classes)), np.int64)

    def add(self, truth: NDArray[np.integer], labels: NDArray[np.integer]) -> None:
        """Count one image or batch; both of one shape, holding class ids."""
        size = len(self.classes)
        pairs = truth.astype(np.int64).ravel() * size + labels.ravel()
        self.counts += np.bincount(pairs, minlength=size * size).reshape(size, size)

    def iou(self) -> NDArray[np.float64]:
        """Per class: pixels in both truth and prediction over pixels in either; NaN for a class that is in neither."""
        both = np.diag(self.counts).astype(float)
        either = self.counts.sum(axis=0) + self.counts.sum(axis=1) - both
        return np.divide(both, either, out=np.full(len(both), np.nan), where=either > 0)

    def mean_iou(self) -> float:
        """Mean over the classes that occur."""
        return float(np.nanmean(self.iou()))

    def accuracy(self) -> float:
        """Fraction of pixels whose label is right."""
        return float(np.diag(self.counts).sum() / self.counts.sum())

    def table(self) -> str:
        """Per-class IoU and fraction of the pixels, then the mean, as aligned text."""
        fractions = self.counts.sum(axis=1) / self.counts.sum()
        width = max(len(name) for name in (*self.classes, "pixel accuracy"))
        lines = [f"{'class':{width}}  {'IoU':>6}  {'pixels':>7}"]
        rows = zip(self.classes, self.iou(), fractions, strict=True)
        lines += [f"{name:{width}}  {iou:6.3f}  {fraction:7.2%}" for name, iou, fraction in rows]
        lines += [f"{'mIoU':{width}}  {self.mean_iou():6.3f}", f"{'pixel accuracy':{width}}  {self.accuracy():6.3f}"]
        return "\n".join(lines)
