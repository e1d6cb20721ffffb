# SPDX-License-Identifier: Apache-2.0
"""The label maps that a model is scored against: which belongs to which image, and the class of each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.datasets.layouts import (
    IGNORED,
    LABEL_ENDINGS,
    Encoding,
    Layout,
    label_maps,
    layout_named,
    recognise,
    same,
)
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.imaging.label_map import read_label_map
from internimage_deploy.runtime.pipelines.find import ImageFile, find_inputs
from internimage_deploy.runtime.pipelines.storage import Location, Storage

_VALUES = 1 << 16  # that a label map can hold
_SHOWN = 3  # files named in a message


@dataclass(frozen=True)
class Truth:
    """Label maps and what their values mean; plain data that any machine of a cluster can open.

    Attributes:
        folder: where they lie.
        paths: relative to `folder`, by the stem of the image.
        encoding: see `Encoding`.
        classes: number of classes that count; a value of a class from there on is unknown.
        meaning: of the values, for people.
        ignore_unknown: count unknown values as ignored; without it they are an error.
    """

    folder: Location
    paths: dict[str, str]
    encoding: Encoding
    classes: int
    meaning: str
    ignore_unknown: bool = False

    def read(self, storage: Storage, stem: str, size: tuple[int, int]) -> npt.NDArray[np.int32]:
        """Class ids (H, W) of an image of (height, width); `classes` where a pixel is ignored.

        Args:
            storage: `folder`, opened.
            stem: of the image.
            size: of the image.

        Raises:
            UserError: the file cannot be read, has another size or several channels, or holds an unknown value.
        """
        path = self.paths[stem]
        name = f"{self.folder}/{path}"
        values = read_label_map(storage.read(path), name, size)
        if values.dtype.itemsize > 2:
            values = np.where((values < 0) | (values >= _VALUES), _VALUES, values)
        unknown = self.classes if self.ignore_unknown else self.classes + 1
        table = np.full(_VALUES + 1, unknown, np.int32)
        for value, index in self.encoding.items():
            if index == IGNORED or index < self.classes:
                table[value] = self.classes if index == IGNORED else index
        truth = table[values]
        if not self.ignore_unknown and (wrong := truth == unknown).any():
            found = np.unique(values[wrong])
            shown = ", ".join(map(str, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
            raise UserError(
                f"{name}: {int(wrong.sum()):,} pixels of value {shown}, which is none of the {self.classes} classes "
                f"({self.meaning}; 255 is ignored); check --dataset, or count them as ignored with --ignore-unknown"
            )
        return truth


@dataclass(frozen=True)
class Pairs:
    """Images with their label maps.

    Attributes:
        layout: of the data set.
        images: that have a label map.
        truth: the label maps.
        notes: what a user should know, a line each.
    """

    layout: Layout
    images: list[ImageFile]
    truth: Truth
    notes: list[str] = field(default_factory=list)


def find_pairs(
    images: str,
    labels: str,
    classes: int,
    *,
    dataset: str | None = None,
    split: Path | None = None,
    ignore_unknown: bool = False,
    skip_unlabeled: bool = False,
) -> Pairs:
    """The images in a folder and the label maps that belong to them.

    Args:
        images: a folder or prefix, searched to any depth.
        labels: likewise; a label map has the image's path, but for its ending and the data set's suffixes.
        classes: number of the model's classes.
        dataset: a name of `LAYOUTS`; None to recognise it.
        split: a text file with the stem of an image in each line; None for the data set's own, or all images.
        ignore_unknown: see `Truth`.
        skip_unlabeled: leave out images without a label map, which are an error otherwise.

    Raises:
        UserError: a folder holds nothing, images have no label map, or the split names none of them.
    """
    where = Location(labels)
    if not where.is_address and where.uri and Path(labels).resolve() == Path(images).resolve():
        raise UserError(f"{labels}: both --images and --labels; expected the label maps in a folder of their own")
    paths = where.open().list(recursive=True)
    if not any(PurePosixPath(path).suffix.lower() in LABEL_ENDINGS for path in paths):
        raise UserError(f"{labels}: no label map here, expected files ending in {', '.join(LABEL_ENDINGS)}")
    inputs = find_inputs([images], recursive=True)
    if inputs.missing:  # of a list of files
        raise UserError(f"{inputs.missing[0][0]}: {inputs.missing[0][1]}; named in {images}")
    found = inputs.images
    if not found:
        raise UserError(f"{images}: no image here")
    maps = [path for path in paths if PurePosixPath(path).suffix.lower() in LABEL_ENDINGS]
    full_images, full_labels = (
        name if "://" in name else Path(name).absolute().as_posix() for name in (images, labels)
    )
    layout = layout_named(dataset) if dataset else recognise(full_images, full_labels, maps, classes)
    rule, by_stem = label_maps(layout, paths)
    counted = min(layout.classes or classes, classes)
    encoding = same(classes) if rule.encoding is None else rule.encoding
    notes: list[str] = []
    found, kept = _in_split(found, layout, images, split)
    if kept is not None:
        notes.append(f"{len(found)} images of {kept}")
    labeled = {image.stem: path for image in found if (path := by_stem.get(_stem(image, layout))) is not None}
    missing = [image for image in found if image.stem not in labeled]
    if missing and (not skip_unlabeled or not labeled):
        shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
        expected = f"{labels}/{_stem(missing[0], layout)}{rule.suffix}.png"
        further = "" if not labeled else "; leave them out with --skip-unlabeled"
        raise UserError(
            f"{len(missing)} of {len(found)} images have no label map: {shown}; expected {expected}{further}"
        )
    if missing:
        notes.append(f"{len(missing)} images without a label map are left out")
    truth = Truth(where, labeled, encoding, counted, rule.meaning, ignore_unknown)
    return Pairs(layout, [image for image in found if image.stem in labeled], truth, notes)


def _in_split(
    images: list[ImageFile], layout: Layout, folder: str, split: Path | None
) -> tuple[list[ImageFile], Path | None]:
    """Those of `images` that the split names, and the split's file; all of them and None where there is none."""
    if split is None and "://" not in folder:
        split = next((path for name in layout.split if (path := Path(folder) / name).is_file()), None)
    if split is None:
        return images, None
    try:
        lines = split.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{split}: cannot be read as a list of images ({error})") from error
    wanted = {line.strip() for line in lines if line.strip()}
    chosen = [image for image in images if _stem(image, layout) in wanted]
    if len(chosen) < len(wanted):
        absent = sorted(wanted - {_stem(image, layout) for image in chosen})
        raise UserError(
            f"{split}: {len(absent)} of its {len(wanted)} images are not in {folder}, {absent[0]} the first; expected "
            "a stem in each line, without the file's ending"
        )
    if not chosen:
        raise UserError(f"{split}: an empty list, expected the stem of an image in each line")
    return chosen, split


def _stem(image: ImageFile, layout: Layout) -> str:
    return str(PurePosixPath(image.path).with_suffix("")).removesuffix(layout.image_suffix)


def differing_names(names: Sequence[str], expected: Sequence[str]) -> str:
    """A note where a model's class names are not those of the data set; empty where they are."""
    pairs = list(zip(names, expected, strict=False))
    wrong = [(index, a, b) for index, (a, b) in enumerate(pairs) if _plain(a) != _plain(b)]
    if not wrong:
        return ""
    index, a, b = wrong[0]
    return f"{len(wrong)} of {len(pairs)} class names are not the data set's: class {index} is '{a}', there '{b}'"


def _plain(name: Any) -> str:
    return "".join(char for char in str(name).lower() if char.isalnum())
