# SPDX-License-Identifier: Apache-2.0
"""The result of an evaluation: exact counts, and the metrics of mmsegmentation computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How a model does on labelled images.

    Attributes:
        model: the file's name.
        dataset: the layout that the label maps were read by, a name of `internimage_deploy.datasets.layouts.LAYOUTS`.
        classes: names by class id, of those that count.
        confusion: (classes, classes of the model) int64, pixels by true class and predicted class.
        ignored: pixels that no class was stated for.
        images: number of images that were counted.
        failed: (image, reason) of those that could not be; they are in no count.
        seconds: that this run took, loading the model aside.
        timed_images: images that were run in that time; the others were counted by an earlier run.
        against: the same for the model that it was compared with.
        agreement: fraction of all pixels to which both models assign the same class.
    """

    model: str
    dataset: str
    classes: tuple[str, ...]
    confusion: npt.NDArray[np.int64]
    ignored: int
    images: int
    failed: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    timed_images: int = 0
    against: Evaluation | None = None
    agreement: float | None = None

    def __repr__(self) -> str:
        return f"<Evaluation of {self.model} on {self.images} images: mIoU {self.miou:.4f}>"

    @property
    def iou(self) -> Floats:
        """(classes,): pixels of the class in truth and prediction over those in either; NaN where there is neither."""
        both, true, predicted = self._areas()
        return _ratio(both, true + predicted - both)

    @property
    def accuracy(self) -> Floats:
        """(classes,): fraction of the class's true pixels that are predicted so; NaN where there are none."""
        both, true, _ = self._areas()
        return _ratio(both, true)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur in truth or prediction; NaN where no class does."""
        return _mean(self.iou)

    @property
    def macc(self) -> float:
        """Mean accuracy over the classes that occur in the truth; NaN where no class does."""
        return _mean(self.accuracy)

    @property
    def aacc(self) -> float:
        """Fraction of all pixels with a true class whose prediction is right; NaN where there are none."""
        both, true, _ = self._areas()
        return float(both.sum() / true.sum()) if true.sum() else math.nan

    @property
    def images_per_second(self) -> float | None:
        """Of this run; None where every image was counted by an earlier one."""
        return self.timed_images / self.seconds if self.timed_images and self.seconds else None

    def changes(self) -> list[tuple[str, float, float]]:
        """(class, IoU, IoU of `against`), those that differ most first; classes that occur in neither are left out.

        A class of which one IoU is NaN differs as one from 0 does.
        """
        if self.against is None:
            return []
        every = zip(self.classes, self.iou.tolist(), self.against.iou.tolist(), strict=True)
        rows = [row for row in every if not (math.isnan(row[1]) and math.isnan(row[2]))]
        return sorted(rows, key=lambda row: -abs(np.nan_to_num(row[1]) - np.nan_to_num(row[2])))

    def table(self) -> list[str]:
        """IoU, accuracy and fraction of the true pixels by class, the worst IoU first, then the means, as lines."""
        _, true, _ = self._areas()
        iou, accuracy = self.iou, self.accuracy
        width = max(len(name) for name in (*self.classes, "class", "mean"))
        lines = [f"{'class':{width}}  {'IoU':>7}  {'Acc':>7}  {'pixels':>7}"]
        for index in np.argsort(iou, kind="stable"):  # NaN comes last
            if math.isnan(iou[index]):
                continue
            fraction = true[index] / max(true.sum(), 1)
            row = f"{self.classes[index]:{width}}  {_percent(iou[index])}  {_percent(accuracy[index])}"
            lines.append(f"{row}  {fraction:7.2%}")
        absent = int(np.isnan(iou).sum())
        if absent:
            lines.append(f"{absent} further classes occur neither in the label maps nor in the predictions")
        lines.append(f"{'mean':{width}}  {_percent(self.miou)}  {_percent(self.macc)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The result as plain data, fractions unrounded, null in place of NaN."""
        _, true, predicted = self._areas()
        columns = zip(self.classes, self.iou.tolist(), self.accuracy.tolist(), true, predicted, strict=True)
        fields: dict[str, Any] = {
            "model": self.model,
            "dataset": self.dataset,
            "images": self.images,
            "mIoU": _number(self.miou),
            "mAcc": _number(self.macc),
            "aAcc": _number(self.aacc),
            "classes": [
                {
                    "id": index,
                    "class": name,
                    "IoU": _number(iou),
                    "Acc": _number(accuracy),
                    "true_pixels": int(pixels),
                    "predicted_pixels": int(found),
                }
                for index, (name, iou, accuracy, pixels, found) in enumerate(columns)
            ],
            "ignored_pixels": self.ignored,
            "images_per_second": self.images_per_second,
            "failed": [{"source": source, "error": error} for source, error in self.failed],
            "confusion": self.confusion.tolist(),
        }
        if self.against is not None:
            fields["agreement"] = self.agreement
            fields["against"] = self.against.to_json()
            fields["changes"] = [
                {"class": name, "IoU": _number(first), "against": _number(second)}
                for name, first, second in self.changes()
            ]
        return fields

    def _areas(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Pixels by class: in both, true, predicted (of the pixels that have a true class)."""
        count = len(self.classes)
        return self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)[:count]


def _ratio(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> Floats:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


def _mean(values: Floats) -> float:
    return math.nan if np.isnan(values).all() else float(np.nanmean(values))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _percent(value: float) -> str:
    return f"{'-':>7}" if math.isnan(value) else f"{value:7.2%}"
