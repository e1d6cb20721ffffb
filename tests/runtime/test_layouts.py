# SPDX-License-Identifier: Apache-2.0
"""The official layouts: a folder built as a data set lies on disk is recognised, and its label maps are read right."""

import numpy as np
import pytest
from PIL import Image

import internimage_deploy
from internimage_deploy import UserError
from internimage_deploy.datasets.classes import lookup
from internimage_deploy.datasets.layouts import IGNORED, LAYOUTS, layout_named
from support.tiny_models import color_model, picture

# Of each data set: name, classes of the model, folders, image, label map, the values that stand for classes 0, 1 and 2
# there, values that are ignored, and values that are unknown. Values from the data sets' own documents.
CASES = {
    "ade20k": (150, "images/validation", "annotations/validation", "ADE_val_00000001.jpg", "ADE_val_00000001.png",
               (1, 2, 3), (0, 255), (151,)),
    "cityscapes": (19, "leftImg8bit/val", "gtFine/val", "ulm/ulm_0_1_leftImg8bit.png",
                   "ulm/ulm_0_1_gtFine_labelTrainIds.png", (0, 1, 2), (255,), (19,)),
    "cityscapes, label ids": (19, "leftImg8bit/val", "gtFine/val", "ulm/ulm_0_1_leftImg8bit.png",
                              "ulm/ulm_0_1_gtFine_labelIds.png", (7, 8, 11), (0, 6, 9, 10, 14, 18, 29, 30), (34,)),
    "cityscapes, 150 outputs": (150, "leftImg8bit/val", "gtFine/val", "ulm/ulm_0_1_leftImg8bit.png",
                                "ulm/ulm_0_1_gtFine_labelTrainIds.png", (0, 1, 2), (255,), (19,)),
    "coco-stuff": (171, "images/val2017", "annotations/val2017", "000000000139.jpg",
                   "000000000139_labelTrainIds.png", (0, 1, 2), (255,), (171,)),
    "coco-stuff, raw": (171, "val2017", "stuffthingmaps/val2017", "000000000139.jpg", "000000000139.png",
                        (0, 1, 2), (255,), (11, 25, 182)),
    "coco-stuff-10k": (171, "images/test2014", "annotations/test2014", "COCO_train2014_000000000077.jpg",
                       "COCO_train2014_000000000077_labelTrainIds.png", (1, 2, 3), (0,), (172,)),
    "mapillary": (66, "validation/images", "validation/labels", "_1Gn_xkw7sa_i9GU4mkxxQ.jpg",
                  "_1Gn_xkw7sa_i9GU4mkxxQ.png", (0, 1, 2), (255,), (66,)),
    "mapillary-19": (19, "validation/images", "validation/labels", "_1Gn_xkw7sa_i9GU4mkxxQ.jpg",
                     "_1Gn_xkw7sa_i9GU4mkxxQ.png", (24, 15, 17), (0, 65), (66,)),
    "mapillary-19, 150 outputs": (150, "validation/images", "validation/labels", "_1Gn_xkw7sa_i9GU4mkxxQ.jpg",
                                  "_1Gn_xkw7sa_i9GU4mkxxQ.png", (13, 2, 17), (0, 65), (66,)),
    "nyu": (40, "image", "label40", "0001.png", "0001.png", (1, 2, 3), (0,), (41,)),
    "pascal-context": (59, "VOC2010/JPEGImages", "VOC2010/SegmentationClassContext", "2008_000002.jpg",
                       "2008_000002.png", (1, 2, 3), (0,), (60,)),
    "pascal-context-60": (60, "VOC2010/JPEGImages", "VOC2010/SegmentationClassContext", "2008_000002.jpg",
                          "2008_000002.png", (0, 1, 2), (255,), (60,)),
}  # fmt: skip
SIZE = (64, 96)


def name_of(case):
    return case.partition(",")[0]


def build(root, case, values):
    """The data set with one image of three stripes, and a label map in which class i has `values[i]`."""
    _, images, labels, image, label, *_ = CASES[case]
    for folder, name in ((images, image), (labels, label)):
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
    shown, classes = picture(*SIZE)
    Image.fromarray(shown).save(root / images / image, quality=100)
    stored = np.array(values, np.uint8)[classes]
    Image.fromarray(stored).save(root / labels / label)
    return root / images, root / labels, stored


def model_of(tmp_path, classes):
    names = tuple(f"class_{index}" for index in range(classes))
    return color_model(tmp_path / "model.onnx", classes=names)


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_recognised_and_its_values_are_read(tmp_path, case):
    classes, *_, values, ignored, unknown = CASES[case]
    images, labels, stored = build(tmp_path, case, values)
    for index, value in enumerate(ignored):
        stored[index] = value
    (path,) = labels.rglob("*.png")
    Image.fromarray(stored).save(path)
    model = model_of(tmp_path, classes)
    result = internimage_deploy.evaluate(model, images, labels, backend="onnxruntime")
    assert (result.dataset, result.failed, result.images) == (name_of(case), (), 1)
    assert len(result.classes) == LAYOUTS[name_of(case)].classes
    assert result.ignored == len(ignored) * SIZE[1]
    # Every stripe is a third of what is left; the JPEG file blurs their borders.
    rows = SIZE[0] - len(ignored)
    np.testing.assert_array_equal(result.confusion.sum(1)[:3], [rows * SIZE[1] // 3] * 3)
    assert result.confusion.sum(1)[3:].sum() == 0
    assert result.aacc > 0.9
    assert np.isnan(result.iou[3:]).all()
    for value in unknown:
        stored[-1, -1] = value
        Image.fromarray(stored).save(path)
        with pytest.raises(UserError, match=rf"1 pixels of value {value}, which is none of the {len(result.classes)}"):
            internimage_deploy.evaluate(model, images, labels, backend="onnxruntime")


@pytest.mark.parametrize("case", ["ade20k", "coco-stuff, raw", "coco-stuff-10k", "mapillary-19"])
def test_names_that_anyone_might_choose_are_not_taken_for_a_data_set(tmp_path, case):
    """In the same folders, files of other names hold class ids."""
    classes, images, labels, *_ = CASES[case]
    for folder, name in ((images, "a.jpg"), (labels, "a.png")):
        (tmp_path / folder).mkdir(parents=True)
        shown, ids = picture(*SIZE)
        Image.fromarray(shown if name == "a.jpg" else ids).save(tmp_path / folder / name)
    model = model_of(tmp_path, classes)
    result = internimage_deploy.evaluate(model, tmp_path / images, tmp_path / labels, backend="onnxruntime")
    assert (result.dataset, result.aacc > 0.9) == ("folder", True)
    with pytest.raises(UserError, match="no data set 'ade'; expected one of ade20k"):
        internimage_deploy.evaluate(model, tmp_path / images, tmp_path / labels, dataset="ade")


def test_a_data_set_that_is_named_is_not_guessed(tmp_path, run):
    images, labels, _ = build(tmp_path, "nyu", (1, 2, 3))
    result = internimage_deploy.evaluate(
        model_of(tmp_path, 40), images, labels, dataset="folder", backend="onnxruntime"
    )
    assert (result.dataset, result.aacc) == ("folder", 0.0)
    code, out, err = run(
        "evaluate", tmp_path / "model.onnx", "--images", images, "--labels", labels, "--backend", "onnxruntime"
    )
    assert (code, "label maps: nyu, 0 is ignored, other values are class ids plus 1, 255 is ignored" in out) == (
        0,
        True,
    )
    assert "40 of 40 class names are not the data set's: class 0 is 'class_0', there 'wall'" in err


@pytest.mark.parametrize(
    ("case", "split"), [("nyu", "test.txt"), ("pascal-context", "VOC2010/ImageSets/SegmentationContext/val.txt")]
)
def test_the_split_of_a_data_set_counts(tmp_path, case, split):
    images, labels, _ = build(tmp_path, case, (1, 2, 3))
    (image,) = images.iterdir()
    other = image.with_stem("other")
    other.write_bytes(image.read_bytes())  # an image of the training split, without a label map here
    (tmp_path / split).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / split).write_text(f"{image.stem}\n")
    result = internimage_deploy.evaluate(model_of(tmp_path, CASES[case][0]), images, labels, backend="onnxruntime")
    assert (result.images, result.aacc > 0.9) == (1, True)


def test_train_ids_are_preferred_to_label_ids_beside_them(tmp_path):
    images, labels, _ = build(tmp_path, "cityscapes", (0, 1, 2))
    build(tmp_path, "cityscapes, label ids", (7, 8, 8))
    (labels / "ulm" / "ulm_0_1_gtFine_color.png").write_bytes(b"of no use")
    result = internimage_deploy.evaluate(model_of(tmp_path, 19), images, labels, backend="onnxruntime")
    assert result.confusion.sum(1)[2] > 0


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "folder"])
def test_every_class_has_a_value_and_no_two_share_one(name):
    layout = LAYOUTS[name]
    for rule in layout.rules:
        classes = [index for index in rule.encoding.values() if index != IGNORED]
        assert set(classes) == set(range(layout.classes))
        assert len(classes) == layout.classes or name == "mapillary-19"
        assert rule.encoding[255] == IGNORED


def test_merged_classes_keep_their_meaning():
    """Mapillary's and Cityscapes' tables name what the official mapping puts together."""
    mapillary, cityscapes = lookup("mapillary")[0], lookup("cityscapes")[0]
    merged = LAYOUTS["mapillary-19"].rules[0].encoding
    named = {
        cityscapes[index]: {mapillary[v] for v, i in merged.items() if i == index and v < 66}
        for index in (0, 2, 12, 13)
    }
    assert named["building"] == {"Building"}
    assert named["car"] == {"Car"}
    assert "Road" in named["road"]
    assert "Bicyclist" in named["rider"]
    with pytest.raises(UserError, match="no data set 'x'; expected one of ade20k, cityscapes"):
        layout_named("x")
