# SPDX-License-Identifier: Apache-2.0
"""The result of segmenting one image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_write, make_folder
from internimage_deploy.runtime.imaging import results
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.imaging.results import ResultOptions


@dataclass(frozen=True)
class Segmentation:
    """Labels of an image and what they mean.

    Attributes:
        labels: (H, W) class ids at the image's own size; uint8 up to 256 classes, else int32.
        classes: names by id.
        palette: (R, G, B) by id.
        image: the image, (H, W, 3) uint8 RGB.
    """

    labels: Labels
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    image: npt.NDArray[np.uint8] = field(repr=False)

    def pixels(self) -> dict[int, int]:
        """Number of pixels by class id, of the classes that occur, most frequent first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        return {int(index): int(counts[index]) for index in order if counts[index]}

    def class_fractions(self) -> dict[str, float]:
        """Fraction of the image by class name, of the classes that occur, most frequent first; they sum to 1."""
        fractions: dict[str, float] = {}
        for index, count in self.pixels().items():
            name = self.classes[index]  # tables exist in which two ids have one name
            fractions[name] = fractions.get(name, 0.0) + count / self.labels.size
        return fractions

    shares = class_fractions  # the name it had in 0.1

    def colors(self) -> npt.NDArray[np.uint8]:
        """The labels in the colours of their palette: (H, W, 3) uint8 RGB."""
        return np.take(np.asarray(self.palette, np.uint8), self.labels, axis=0)

    def overlay(self, alpha: float = 0.5) -> npt.NDArray[np.uint8]:
        """The image with its labels drawn over it: (H, W, 3) uint8 RGB.

        Args:
            alpha: weight of the labels' colours; 0 is the image alone.

        Raises:
            UserError: `alpha` is outside 0 to 1.
        """
        import cv2

        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha}, expected a number from 0 to 1")
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

    def save(
        self,
        folder: str | Path,
        stem: str,
        *,
        overlay: bool = False,
        as_json: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write STEM.labels.png into `folder`, which is made if it does not exist; as the command `segment` does.

        Args:
            folder: where to write.
            stem: what the files are named after; may hold subfolders ("day1/frame7").
            overlay: also write STEM.overlay.png, the image with its labels over it.
            as_json: also write STEM.json, `summary()` with `metadata` before it.
            metadata: plain data about the image.

        Returns:
            The files' paths, the label map last.

        Raises:
            UserError: a file cannot be written.
        """
        target = Path(folder) / stem
        make_folder(target.parent)
        files = self.encode(ResultOptions(overlay, as_json), metadata or {})
        paths = [target.with_name(target.name + ending) for ending in files]
        for path, data in zip(paths, files.values(), strict=True):
            atomic_write(path, data)
        return paths

    def encode(self, options: ResultOptions, metadata: Mapping[str, Any]) -> dict[str, bytes]:
        """The content of each result file by its ending, in the order in which they are to be written."""
        files = {}
        if options.overlay:
            files[results.OVERLAY] = results.png(self.overlay())
        if options.as_json:
            files[results.JSON] = (json.dumps({**metadata, **self.summary()}, indent=1) + "\n").encode()
        files[results.LABELS] = results.png(self.labels)
        return files
