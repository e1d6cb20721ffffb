# SPDX-License-Identifier: Apache-2.0
"""The result of segmenting one image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_write, make_folder
from internimage_deploy.runtime.imaging import drawing, results
from internimage_deploy.runtime.imaging.fetch import address_stem, is_web_address
from internimage_deploy.runtime.imaging.postprocess import Labels
from internimage_deploy.runtime.imaging.results import Mask, ResultOptions

_COUNTED_ROWS = 64


@dataclass(frozen=True, repr=False)
class Segmentation:
    """Labels of an image and what they mean.

    Attributes:
        labels: (H, W) class ids at the image's own size; uint8 up to 256 classes, else int32.
        classes: names by id.
        palette: (R, G, B) by id.
        image: the image, (H, W, 3) uint8 RGB.
        source: the image's path or address; empty for one that came as an array.
    """

    labels: Labels
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    image: npt.NDArray[np.uint8] = field(repr=False)
    source: str = ""

    def __repr__(self) -> str:
        height, width = self.labels.shape
        largest = ", ".join(f"{name} {fraction:.0%}" for name, fraction in list(self.class_fractions().items())[:3])
        return f"<Segmentation {width}x{height} of {len(self.classes)} classes: {largest}>"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the overlay."""
        return results.png(self.overlay())

    def pixels(self) -> dict[int, int]:
        """Number of pixels by class id, of the classes that occur, most frequent first."""
        counts = np.zeros(max(len(self.classes), int(self.labels.max(initial=0)) + 1), np.int64)
        for start in range(0, len(self.labels), _COUNTED_ROWS):  # bincount takes 8 bytes for each label
            counts += np.bincount(self.labels[start : start + _COUNTED_ROWS].ravel(), minlength=len(counts))
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

    def color_mask(self) -> npt.NDArray[np.uint8]:
        """The labels in the colours of their palette: (H, W, 3) uint8 RGB."""
        return np.take(np.asarray(self.palette, np.uint8), self.labels, axis=0)

    colors = color_mask  # the name it had in 0.1

    def overlay(
        self, alpha: float = 0.5, *, legend: bool = False, classes: Sequence[int | str] | None = None
    ) -> npt.NDArray[np.uint8]:
        """The image with its labels drawn over it.

        Args:
            alpha: weight of the labels' colours, 0 to 1; 0 is the image alone.
            legend: list the classes that occur, most frequent first, right of the image.
            classes: ids or names of the classes that are drawn; None for all.

        Returns:
            (H, W, 3) uint8 RGB; wider with a legend.

        Raises:
            UserError: `alpha` is outside 0 to 1, or a class is not among the ids.
        """
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is {alpha}, expected a number from 0 to 1")
        ids = None if classes is None else self._ids(classes)
        drawn = drawing.blend(self.image, self.labels, self.palette, alpha, ids)
        if not legend:
            return drawn
        shown = [index for index in self.pixels() if ids is None or index in ids]
        return drawing.with_legend(drawn, [(self.classes[index], self.palette[index]) for index in shown])

    def _ids(self, classes: Sequence[int | str]) -> list[int]:
        """Class ids from ids or names."""
        ids: list[int] = []
        for given in [classes] if isinstance(classes, str) else classes:
            found = [given] if isinstance(given, int) else [i for i, name in enumerate(self.classes) if name == given]
            if not found or not 0 <= found[0] < len(self.classes):
                raise UserError(f"class {given!r} is not among the {len(self.classes)} classes of this model")
            ids += found
        return ids

    def show(self) -> None:
        """Open the overlay in the system's image viewer; a notebook shows a result by itself."""
        from PIL import Image

        Image.fromarray(self.overlay()).show()

    def summary(self, classes: Sequence[int] | None = None) -> dict[str, Any]:
        """Size and classes as plain data: `{"width", "height", "classes": [{"id", "class", "pixels", "share"}]}`.

        Args:
            classes: ids of the classes that are listed; None for all that occur.
        """
        height, width = self.labels.shape
        return {
            "width": width,
            "height": height,
            "classes": [
                {"id": index, "class": self.classes[index], "pixels": count, "share": count / self.labels.size}
                for index, count in self.pixels().items()
                if classes is None or index in classes
            ],
        }

    def mask(self, kind: Mask = "indexed") -> bytes:
        """The label map as a PNG file; see `ResultOptions.mask` for the kinds."""
        if kind not in get_args(Mask):
            raise UserError(f"mask is {kind!r}, expected one of {', '.join(get_args(Mask))}")
        if kind == "color":
            return results.png(self.color_mask())
        return results.indexed_png(self.labels, self.palette) if kind == "indexed" else results.png(self.labels)

    def save(
        self,
        folder: str | Path,
        stem: str | None = None,
        *,
        overlay: bool = False,
        as_json: bool = False,
        mask: Mask = "indexed",
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write STEM.labels.png into `folder`, which is made if it does not exist; as the command `segment` does.

        Args:
            folder: where to write.
            stem: what the files are named after; may hold subfolders ("day1/frame7"). None for the image's own name.
            overlay: also write STEM.overlay.png, the image with its labels over it.
            as_json: also write STEM.json, `summary()` with `metadata` before it.
            mask: format of the label map, see `ResultOptions`.
            metadata: plain data about the image.

        Returns:
            The files' paths, the label map last.

        Raises:
            UserError: a file cannot be written.
        """
        own = address_stem(self.source) if is_web_address(self.source) else Path(self.source).stem
        target = Path(folder) / (stem or own or "image")
        make_folder(target.parent)
        files = self.encode(ResultOptions(overlay, as_json, mask), metadata or {})
        paths = [target.with_name(target.name + ending) for ending in files]
        for path, data in zip(paths, files.values(), strict=True):
            atomic_write(path, data)
        return paths

    def encode(self, options: ResultOptions, metadata: Mapping[str, Any]) -> dict[str, bytes]:
        """The content of each result file by its ending, in the order in which they are to be written."""
        files = {}
        if options.overlay:
            overlay = self.overlay(options.alpha, legend=options.legend, classes=options.classes)
            jpeg = options.overlay_format == "jpeg"
            if jpeg and max(overlay.shape) > results.MAX_JPEG_SIDE:
                raise UserError(
                    f"an overlay of {overlay.shape[1]}x{overlay.shape[0]}: a JPEG file holds at most "
                    f"{results.MAX_JPEG_SIDE} pixels a side; use --overlay-format png"
                )
            files[results.OVERLAY_JPEG if jpeg else results.OVERLAY] = (results.jpeg if jpeg else results.png)(overlay)
        if options.as_json:
            summary = self.summary(options.classes)
            files[results.JSON] = (json.dumps({**metadata, **summary}, indent=1) + "\n").encode()
        files[results.LABELS] = self.mask(options.mask)
        return files
