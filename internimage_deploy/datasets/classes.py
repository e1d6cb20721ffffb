# SPDX-License-Identifier: Apache-2.0
"""Class names and palettes: those of the data sets that the released models were trained on, and the user's own.

The tables are JSON files beside this module, a line `[name, red, green, blue]` per class in the order of the ids; names
and colours are those that mmsegmentation and the official InternImage repository list.
"""

from __future__ import annotations

import colorsys
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from internimage_deploy.errors import UserError, is_plain_text, one_line, quoted

_MAX_FILE = 4_000_000  # bytes of a file of names or colours
_MAX_CLASSES = 65_536

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


def read_classes(classes: str | os.PathLike[str] | Sequence[str]) -> tuple[Classes, Palette]:
    """The names that a user states, and colours for them.

    Args:
        classes: a data set's name, a number of classes, a file, or the names themselves. A file has one name per line,
            or a JSON list of names.

    Returns:
        The names and as many colours: the data set's where these are its names, generic ones otherwise.

    Raises:
        UserError: a text that is none of these, or a file without names.
    """
    if isinstance(classes, str | os.PathLike):
        where = os.fspath(classes)
        known = lookup(int(where) if where.isascii() and where.isdigit() and len(where) < 9 else where)
        if (text := _file_text(where, "--classes")) is None:
            if known is None:
                raise UserError(
                    f"--classes {quoted(where)}: neither a data set nor a file; expected one of {', '.join(DATASETS)}, "
                    "or a text file with one name per line"
                )
            return known
        rows = _json_list(text, where, "--classes")
        names = [line.strip() for line in text.splitlines() if line.strip()] if rows is None else rows
    else:
        where, names = "", list(classes)
    if not names:
        raise UserError(f"--classes {where}: there are no names, expected one per line")
    for name in names:
        if not is_class_name(name):
            raise UserError(f"--classes {where}: got the name {quoted(name)}, expected a line of printable text")
    if len(names) > _MAX_CLASSES:
        raise UserError(f"--classes {where}: {len(names):,} names, expected {_MAX_CLASSES:,} at most")
    table = lookup(len(names))
    stated = tuple(map(str, names))
    return stated, table[1] if table is not None and table[0] == stated else generic(len(names))[1]


def read_palette(palette: str | os.PathLike[str] | Sequence[Sequence[int]]) -> Palette:
    """The colours that a user states.

    Args:
        palette: a data set's name, a file, or (red, green, blue) triples, each 0 to 255. A file has three numbers per
            line, with blanks or commas between them, or is a JSON list of triples.

    Raises:
        UserError: a text that is neither, or anything that is no colour.
    """
    rows: Sequence[object]
    where = ""
    if isinstance(palette, str | os.PathLike):
        where = os.fspath(palette)
        text = _file_text(where, "--palette")
        if text is None:
            if (known := lookup(where)) is None:
                raise UserError(
                    f"--palette {quoted(where)}: neither a data set nor a file; expected one of {', '.join(DATASETS)}, "
                    "or a file with a line 'red green blue' per class"
                )
            return known[1]
        listed = _json_list(text, where, "--palette")
        lines = [re.split(r"[\s,;]+", line.strip()) for line in text.splitlines() if line.strip()]
        rows = lines if listed is None else listed
    else:
        rows = list(palette)
    if not rows:
        raise UserError(f"--palette {where}: there are no colours, expected a line 'red green blue' per class")
    return tuple(_stated_color(row, where) for row in rows[:_MAX_CLASSES])


def is_class_name(name: object) -> bool:
    """True for a text that a card, a table and a terminal can show on one line."""
    return isinstance(name, str) and 0 < len(name) <= 200 and is_plain_text(name)


def _stated_color(row: object, where: str) -> tuple[int, int, int]:
    values: list[int] = []
    for value in row if isinstance(row, list | tuple) else ():
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 3:
            value = int(value)
        if type(value) is int and 0 <= value <= 255:
            values.append(value)
    if not isinstance(row, list | tuple) or len(row) != 3 or len(values) != 3:
        text = " ".join(row) if isinstance(row, list) and all(isinstance(v, str) for v in row) else row
        raise UserError(f"--palette {where}: got '{quoted(text)}', expected red, green and blue, each from 0 to 255")
    return values[0], values[1], values[2]


def _file_text(where: str, option: str) -> str | None:
    """What stands in the file `where`; None where there is none."""
    path = Path(where)
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_FILE:
            raise UserError(f"{option} {where}: larger than {_MAX_FILE:,} bytes, so no list of classes")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if len(where) > 200:  # no name of a file
            return None
        raise UserError(f"{option} {where}: cannot be read as text ({one_line(error)})") from error


def _json_list(text: str, where: str, option: str) -> list[object] | None:
    """The list that `text` is in JSON; None where it is no JSON."""
    if not text.lstrip().startswith("["):
        return None
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} {where}: begins like JSON and is none ({one_line(error)})") from error
    return list(listed)


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
