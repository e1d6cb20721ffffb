# SPDX-License-Identifier: Apache-2.0
"""Layouts of data sets on disk: which label map belongs to an image, and which class each value in it means.

The official ones are those that mmsegmentation and the official InternImage configs read: names of folders and files,
label encodings, and 255 as the value that is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from internimage_deploy.errors import UserError

IGNORED = -1
"""In an `Encoding`: a value that counts as no class."""
IGNORE_VALUE = 255
"""The value of ignored pixels in label maps, as in mmsegmentation."""
LABEL_ENDINGS = (".png", ".tif", ".tiff", ".bmp", ".gif")
"""Endings of label maps; JPEG changes values."""

Encoding = Mapping[int, int]
"""From a value in a label map to the class id that it means, or to `IGNORED`."""


@dataclass(frozen=True)
class Rule:
    """Label maps of one encoding.

    Attributes:
        suffix: what follows the image's stem in the label map's.
        encoding: of their values; None where they are the model's class ids.
        meaning: of the values, for people.
    """

    suffix: str
    encoding: Encoding | None
    meaning: str


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk.

    Attributes:
        name: what `--dataset` calls it.
        classes: number of its classes; None for as many as the model has.
        rules: the first of which there is a label map counts for all.
        image_suffix: how the stems of images end; the label map's suffix takes its place.
        split: paths of lists of images, one stem per line, from the folder of the images; the first that exists counts.
    """

    name: str
    classes: int | None
    rules: tuple[Rule, ...]
    image_suffix: str = ""
    split: tuple[str, ...] = ()


def same(classes: int) -> Encoding:
    """Values are class ids; 255 is ignored."""
    return {**{value: value for value in range(classes)}, IGNORE_VALUE: IGNORED}


def zero_ignored(classes: int) -> Encoding:
    """0 is ignored and the value above each class id means it: mmsegmentation's `reduce_zero_label`."""
    return {0: IGNORED, **{value + 1: value for value in range(classes)}, IGNORE_VALUE: IGNORED}


# The evaluated classes of Cityscapes by their label id, in the order of their train ids.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_IDS = {**dict.fromkeys((*range(34), IGNORE_VALUE), IGNORED), **{v: i for i, v in enumerate(_CITYSCAPES)}}
# COCO-Stuff's raw values run to 181, with gaps where COCO has removed a class.
_COCO_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_COCO_IDS = {
    **{value: index for index, value in enumerate(value for value in range(182) if value not in _COCO_GAPS)},
    IGNORE_VALUE: IGNORED,
}
# Mapillary's classes as the official configs merge them into those of Cityscapes (`MapillaryHack`).
_MAPILLARY = (
    (13, 24, 41), (2, 15), (17,), (6,), (3,), (45, 47), (48,), (50,), (30,), (29,), (27,), (19,), (20, 21, 22), (55,),
    (61,), (54,), (58,), (57,), (52,),
)  # fmt: skip
_MAPILLARY_19 = {
    **dict.fromkeys((*range(66), IGNORE_VALUE), IGNORED),
    **{value: index for index, values in enumerate(_MAPILLARY) for value in values},
}

_IDS = "values are class ids"
_ZERO = "0 is ignored, other values are class ids plus 1"
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("ade20k", 150, (Rule("", zero_ignored(150), _ZERO),)),
        Layout(
            "cityscapes",
            19,
            (
                Rule("_gtFine_labelTrainIds", same(19), "values are train ids"),
                Rule("_gtFine_labelIds", _CITYSCAPES_IDS, "values are label ids, mapped to train ids"),
            ),
            image_suffix="_leftImg8bit",
        ),
        Layout(
            "coco-stuff",
            171,
            (
                Rule("_labelTrainIds", same(171), "values are train ids"),
                Rule("", _COCO_IDS, "values are those of the raw maps, mapped to train ids"),
            ),
        ),
        Layout(
            "coco-stuff-10k",
            171,
            (Rule("_labelTrainIds", zero_ignored(171), _ZERO), Rule("", zero_ignored(171), _ZERO)),
        ),
        Layout("mapillary", 66, (Rule("", same(66), _IDS),)),
        Layout("mapillary-19", 19, (Rule("", _MAPILLARY_19, "values are merged into the 19 classes of Cityscapes"),)),
        Layout("nyu", 40, (Rule("", zero_ignored(40), _ZERO),), split=("../test.txt",)),
        Layout(
            "pascal-context",
            59,
            (Rule("", zero_ignored(59), _ZERO),),
            split=("../ImageSets/SegmentationContext/val.txt",),
        ),
        Layout(
            "pascal-context-60",
            60,
            (Rule("", same(60), _IDS),),
            split=("../ImageSets/SegmentationContext/val.txt",),
        ),
        Layout("folder", None, (Rule(".labels", None, _IDS), Rule("", None, _IDS))),
    )
}
"""By name. "folder" pairs files of one stem, the label maps that `segment` writes among them."""


def recognise(images: str, labels: str, label_paths: Sequence[str], classes: int) -> Layout:
    """The layout of a data set, by its folders and the names of its files; "folder" where it is none of the official.

    Where the folders have names that anyone might choose, the files must have the data set's own names too: counted
    with another's encoding, label maps would give a wrong result without an error.

    Args:
        images: the folder of the images.
        labels: the folder of the label maps.
        label_paths: label maps, relative to their folder.
        classes: number of the model's classes.
    """
    stems = [PurePosixPath(path).stem for path in label_paths]
    image_folders, label_folders = (PurePosixPath(folder).parts[-3:] for folder in (images, labels))

    def named(pattern: str) -> bool:
        return bool(stems) and all(re.fullmatch(pattern, stem) for stem in stems)

    def folders(pattern: str) -> bool:
        places = (image_folders, label_folders)
        return all(any(re.fullmatch(pattern, part) for part in parts) for parts in places)

    name = "folder"
    if any(stem.endswith(("_gtFine_labelTrainIds", "_gtFine_labelIds")) for stem in stems):
        name = "cityscapes"
    elif image_folders[-1:] == ("JPEGImages",) and label_folders[-1:] == ("SegmentationClassContext",):
        name = "pascal-context-60" if classes == 60 else "pascal-context"
    elif image_folders[-1:] == ("image",) and label_folders[-1:] == ("label40",):
        name = "nyu"
    elif folders("(train|val)2017") and named(r"\d{12}(_labelTrainIds)?"):
        name = "coco-stuff"
    elif folders("(train|test)2014") and named(r"COCO_train2014_\d{12}(_labelTrainIds)?"):
        name = "coco-stuff-10k"
    elif named(r"ADE_(train|val)_\d{8}"):
        name = "ade20k"
    elif folders("(training|validation)") and named(r"[\w-]{22}"):
        name = "mapillary" if classes in (65, 66) else "mapillary-19"  # as the released models are trained
    return LAYOUTS[name]


def layout_named(name: str) -> Layout:
    """The layout of a name. Raises `UserError`."""
    if name not in LAYOUTS:
        raise UserError(f"no data set '{name}'; expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def label_maps(layout: Layout, paths: Collection[str]) -> tuple[Rule, dict[str, str]]:
    """The label maps among `paths`, relative to their folder: their rule, and from the image's stem to the path."""
    maps = [path for path in sorted(paths) if PurePosixPath(path).suffix.lower() in LABEL_ENDINGS]
    for rule in layout.rules:
        found: dict[str, str] = {}
        for path in maps:
            stem = str(PurePosixPath(path).with_suffix(""))
            if stem.endswith(rule.suffix):
                found.setdefault(stem.removesuffix(rule.suffix), path)
        if found:
            break
    return rule, found
