# SPDX-License-Identifier: Apache-2.0
"""The result of segmenting one picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.runtime.imaging.postprocess import Labels


@dataclass(frozen=True)
class Segmentation:
    """Labels of a picture and what they mean.

    Attributes:
        labels: (H, W) class ids at the picture's own size; uint8 up to 256 classes, else int32.
        classes: names by id.
        palette: (R, G, B) by id.
        image: the picture, (H, W, 3) uint8 RGB.
    """

    labels: Labels
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    image: npt.NDArray[np.uint8] = field(repr=False)

    def pixels(self) -> dict[int, int]:
        """Pixels by class id, of the classes that occur, most frequent first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        return {int(index): int(counts[index]) for index in order if counts[index]}

    def class_fractions(self) -> dict[str, float]:
        """Fraction of the picture by class name, of the classes that occur, most frequent first; they sum to 1."""
        fractions: dict[str, float] = {}
        for index, count in self.pixels().items():
            name = self.classes[index]  # tables exist in which two ids share a name
            fractions[name] = fractions.get(name, 0.0) + count / self.labels.size
        return fractions

    shares = class_fractions  # its name until 0.1

    def colors(self) -> npt.NDArray[np.uint8]:
        """The labels painted in their palette: (H, W, 3) uint8 RGB."""
        return np.take(np.asarray(self.palette, np.uint8), self.labels, axis=0)

    def overlay(self, alpha: float = 0.5) -> npt.NDArray[np.uint8]:
        """The picture with its labels painted over it: (H, W, 3) uint8 RGB; `alpha` 0 is the picture alone."""
        import cv2

        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, expected 0 to 1")
        return np.asarray(cv2.addWeighted(self.colors(), alpha, self.image, 1 - alpha, 0), np.uint8)

    def summary(self) -> dict[str, Any]:
        """Size and classes as plain data: `{"width", "height", "classes": [{"id", "class", "pixels", "share"}]}`."""
        height, width = self.labels.shape
        return {
            "width": width,
            "height": height,
            "classes": [
                {"id": index, "class": self.classes[index], "pixels": count, "share": count / self.labels.size}
                for index, count in self.pixels().items()
            ],
        }
