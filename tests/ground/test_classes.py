# SPDX-License-Identifier: Apache-2.0
import pytest

from internimage_deploy.datasets.classes import DATASETS, fitted, generic, lookup, read_classes, read_palette
from internimage_deploy.errors import UserError

# (id, name, colour) that the data sets' own papers and tools state: guards against a shifted table.
KNOWN = {
    "ade20k": (150, [(0, "wall", (120, 120, 120)), (6, "road", (140, 140, 140)), (149, "flag", (92, 0, 255))]),
    "cityscapes": (19, [(0, "road", (128, 64, 128)), (10, "sky", (70, 130, 180)), (18, "bicycle", (119, 11, 32))]),
    "mapillary": (66, [(13, "Road", (128, 64, 128)), (27, "Sky", (70, 130, 180)), (55, "Car", (0, 0, 142))]),
    "coco_stuff": (171, [(0, "person", (0, 192, 64)), (79, "toothbrush", (192, 160, 0)), (170, "wood", (64, 64, 0))]),
    "nyu_40": (40, [(0, "wall", (120, 120, 120)), (39, "otherprop", None)]),
    "pascal_context_59": (59, [(0, "aeroplane", (180, 120, 120)), (58, "wood", (31, 0, 255))]),
}


@pytest.mark.parametrize("name", DATASETS)
def test_table(name):
    count, known = KNOWN[name]
    classes, palette = lookup(name)
    assert len(classes) == len(palette) == count
    assert len(set(classes)) == count
    assert all(0 <= value <= 255 for color in palette for value in color)
    for index, expected, color in known:
        assert classes[index] == expected
        assert color is None or palette[index] == color
    assert lookup(count) == (classes, palette)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("ADE20K", "ade20k"),
        ("ADE20KDataset", "ade20k"),
        ("coco_stuff164k", "coco_stuff"),
        ("cocostuff10k", "coco_stuff"),
        ("Pascal-Context-59", "pascal_context_59"),
        ("PascalContextDataset59", "pascal_context_59"),
        ("NYUDepthV2Dataset", "nyu_40"),
        ("MapillaryDataset_v1", "mapillary"),
    ],
)
def test_names_may_be_spelled_in_any_usual_way(spelling, name):
    assert lookup(spelling) == lookup(name)


def test_what_is_unknown_is_none():
    assert lookup("imagenet") is None
    assert lookup("PascalContextDataset") is None  # 60 classes, shifted by the background
    assert lookup(21) is None


def test_generic_colours_differ():
    classes, palette = generic(150)
    assert classes[7] == "class_7"
    assert len(set(palette)) == 150


def test_a_wider_head_keeps_the_known_names():
    classes, palette = fitted(*lookup("mapillary"), 150)
    assert classes[13] == "Road"
    assert classes[66] == "class_66"
    assert len(classes) == len(palette) == 150
    assert fitted(*lookup("mapillary"), 65) == lookup(65)


@pytest.mark.parametrize(
    "text", ["road\nsky\n\n", "\ufeffroad\r\nsky", '["road", "sky"]'], ids=["lines", "windows", "json"]
)
def test_names_from_a_file(text, tmp_path):
    (tmp_path / "names").write_text(text)
    assert read_classes(tmp_path / "names") == read_classes(["road", "sky"]) == (("road", "sky"), generic(2)[1])


@pytest.mark.parametrize(
    "text", ["1 2 3\n4 5 6\n", "1,2,3\n4,5,6", "[[1, 2, 3], [4, 5, 6]]"], ids=["blanks", "commas", "json"]
)
def test_colours_from_a_file(text, tmp_path):
    (tmp_path / "colours").write_text(text)
    assert read_palette(tmp_path / "colours") == read_palette([(1, 2, 3), (4, 5, 6)]) == ((1, 2, 3), (4, 5, 6))
    assert read_palette("cityscapes") == lookup("cityscapes")[1]


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"[", b"[" * 100_000, b"[1, 2]", b'["\\u001b[2J"]', b'["\\ud800"]', b"\x1b[2J", b"\xff\xfe\x00",
     b"[[[]]]", b"1 2 256", b"1 2", b"1 2 3 4", b"1 2 -3", "1 2 ²".encode(), b"[[1, 2, 1e999]]", b"[[true, 1, 1]]",
     b"[{}]", b"x" * 5_000_000],
    ids=range(19),
)  # fmt: skip
def test_broken_files_of_names_and_colours(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_palette(path)
    assert "\n" not in str(error.value)
    try:
        assert all(name.isprintable() for name in read_classes(path)[0])
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert "\x1b" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["imagenet", "²", "\0", "x" * 5000, "9" * 5000, ""])
def test_neither_a_data_set_nor_a_file(name):
    for read in (read_classes, read_palette):
        with pytest.raises(UserError, match="neither a data set nor a file"):
            read(name)
