# SPDX-License-Identifier: Apache-2.0
"""Class names and palettes of the data sets that the released models were trained on.

The tables are JSON files beside this module, a line `[name, red, green, blue]` per class in the order of the ids; names
and colours are those that mmsegmentation and the official InternImage repository list.
"""

from __future__ import annotations

import colorsys
import json
import re
from functools import cache
from importlib.resources import files

Classes = tuple[str, ...]
Palette = tuple[tuple[int, int, int], ...]

# Names as they occur in official config names and dataset types, without case and punctuation. PascalContextDataset is
# not among them: it has 60 classes, of which the background comes first.
_ALIASES = {
    "ade20k": "ade20k",
    "ade": "ade20k",
    "cityscapes": "cityscapes",
    "mapillary": "mapillary",
    "mapillaryvistas": "mapillary",
    "cocostuff": "coco_stuff",
    "cocostuff164k": "coco_stuff",
    "cocostuff10k": "coco_stuff",
    "nyu": "nyu_40",
    "nyu40": "nyu_40",
    "nyudepthv2": "nyu_40",
    "pascalcontext59": "pascal_context_59",
    "pascalcontextdataset59": "pascal_context_59",
}
DATASETS = tuple(dict.fromkeys(_ALIASES.values()))

# 65 is Mapillary without its last class, "Unlabeled".
_COUNTS = {
    19: "cityscapes",
    40: "nyu_40",
    59: "pascal_context_59",
    65: "mapillary",
    66: "mapillary",
    150: "ade20k",
    171: "coco_stuff",
}


def lookup(what: str | int) -> tuple[Classes, Palette] | None:
    """The table of a data set, by its name or by the number of classes; None where there is none.

    Case, punctuation and a trailing "Dataset" do not matter: "ADE20K", "ADE20KDataset", "coco_stuff164k",
    "Pascal-Context-59".
    """
    if isinstance(what, int):
        if what not in _COUNTS:
            return None
        classes, palette = _table(_COUNTS[what])
        return classes[:what], palette[:what]
    name = _ALIASES.get(re.sub(r"(dataset)?(v1)?$", "", re.sub(r"[^a-z0-9]", "", what.lower())))
    return _table(name) if name else None


def generic(count: int) -> tuple[Classes, Palette]:
    """Names "class_0", "class_1", ... and colours that are easy to tell apart, the same on every call."""
    return tuple(f"class_{index}" for index in range(count)), tuple(_color(index) for index in range(count))


def fitted(classes: Classes, palette: Palette, count: int) -> tuple[Classes, Palette]:
    """A table cut to `count` classes, or padded with generic entries.

    Needed where a head is wider than its data set: the official Mapillary models have 150 outputs for 66 classes.
    """
    names, colors = generic(count)
    return classes[:count] + names[len(classes) :], palette[:count] + colors[len(palette) :]


@cache
def _table(name: str) -> tuple[Classes, Palette]:
    text = files("internimage_deploy.datasets").joinpath(f"{name}.json").read_text(encoding="utf-8")
    rows = json.loads(text)
    return tuple(row[0] for row in rows), tuple((row[1], row[2], row[3]) for row in rows)


def _color(index: int) -> tuple[int, int, int]:
    # Steps of the golden ratio never repeat a hue; three levels of light part neighbours that come close.
    hue, saturation, value = index * 0.618033988749895 % 1, 0.85 - 0.25 * (index % 2), 1 - 0.2 * (index % 3)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)
