# SPDX-License-Identifier: Apache-2.0
import pytest

from internimage_deploy.datasets.classes import DATASETS, fitted, generic, lookup

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
