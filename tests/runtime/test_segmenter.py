# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import internimage_deploy
from internimage_deploy import Segmenter, UserError, Window
from internimage_deploy.runtime.imaging.results import ResultOptions
from support.tiny_models import CLASSES, color_model, picture


def agreement(labels, expected):
    assert labels.shape == expected.shape
    return float((labels == expected).mean())


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "logits"])
@pytest.mark.parametrize("size", [None, (64, 96)], ids=["dynamic", "static"])
def test_every_kind_of_model_answers_at_the_pictures_own_size(tmp_path, uint8, labels, size):
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx", uint8=uint8, labels=labels, size=size))
    for height, width in [(70, 150), (150, 70), (64, 96), (31, 33)]:
        image, expected = picture(height, width)
        result = segmenter(image)
        assert result.labels.dtype == np.uint8
        assert agreement(result.labels, expected) > 0.93


def test_a_list_comes_back_in_order_whatever_the_sizes_and_the_batch(tmp_path):
    model = color_model(tmp_path / "m.onnx", resize=(128, 64))
    images = [picture(h, w)[0] for h, w in [(40, 60), (60, 40), (80, 120), (33, 90), (40, 60)]]
    images[-1] = np.ascontiguousarray(images[-1][:, ::-1])
    one_by_one = [Segmenter.load(model)(image) for image in images]
    for batch in (2, 4):
        together = Segmenter.load(model, batch=batch)(images)
        for single, batched in zip(one_by_one, together, strict=True):
            np.testing.assert_array_equal(single.labels, batched.labels)
    assert Segmenter.load(model)([]) == []


def test_a_model_of_fixed_batch_takes_any_number_of_pictures(tmp_path):
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx", size=(64, 64), batch=2))
    image, expected = picture(64, 64)
    results = segmenter([image, image[:, ::-1].copy(), image])
    assert [agreement(results[i].labels, expected) > 0.9 for i in range(3)] == [True, False, True]
    np.testing.assert_array_equal(results[1].labels, results[0].labels[:, ::-1])


def test_paths_and_arrays_give_the_same_result(tmp_path):
    segmenter = Segmenter.load(str(color_model(tmp_path / "m.onnx")))
    image, _ = picture(50, 70)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(segmenter(tmp_path / "a.png").labels, segmenter(image).labels)


def test_the_result_names_shares_and_paints(tmp_path):
    result = Segmenter.load(color_model(tmp_path / "m.onnx"))(picture(96, 96)[0])
    assert result.classes == CLASSES
    assert sum(result.shares().values()) == pytest.approx(1)
    assert result.shares()["green"] == pytest.approx(1 / 3, abs=0.05)
    assert list(result.shares()) == sorted(result.shares(), key=result.shares().get, reverse=True)
    np.testing.assert_array_equal(result.overlay(0), result.image)
    np.testing.assert_array_equal(result.overlay(1), result.colors())
    # alpha 0.5 of (200, 30, 30) under pure red
    assert tuple(result.overlay(0.5)[48, 5]) == pytest.approx((228, 15, 15), abs=1)
    assert sum(entry["pixels"] for entry in result.summary()["classes"]) == 96 * 96


def test_more_than_256_classes_need_wider_labels(tmp_path):
    names = tuple(f"c{i}" for i in range(300))
    result = Segmenter.load(color_model(tmp_path / "m.onnx", classes=names))(picture(64, 64)[0])
    assert result.labels.dtype == np.int32
    assert set(np.unique(result.labels)) == {0, 1, 2}


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((10, 10, 3), np.float32),
        np.zeros((10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((0, 10, 3), np.uint8),
    ],
    ids=["float", "grey", "alpha", "empty"],
)
def test_arrays_that_are_no_picture_are_refused(tmp_path, image):
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx"))
    with pytest.raises(UserError, match=r"expected uint8 \(H, W, 3\)"):
        segmenter(image)


def test_nan_is_said_and_not_turned_into_class_0(tmp_path):
    model = color_model(tmp_path / "m.onnx", uint8=False, card_changes={"std": (1e-300, 1.0, 1.0)})
    with pytest.raises(UserError, match="NaN or infinity"), np.errstate(over="ignore", invalid="ignore"):
        Segmenter.load(model)(picture(64, 64)[0])


def test_results_are_saved_as_the_command_does(tmp_path):
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx"))
    image, labels = picture(40, 60)
    paths = segmenter(image).save(tmp_path / "out", "day1/a", overlay=True, as_json=True, metadata={"image": "a.png"})
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "out/day1/a.overlay.png",
        "out/day1/a.json",
        "out/day1/a.labels.png",
    ]
    assert (np.asarray(Image.open(paths[-1])) == labels).mean() > 0.9
    facts = json.loads(paths[1].read_text())
    assert (facts["image"], facts["width"], facts["height"]) == ("a.png", 60, 40)
    assert np.asarray(Image.open(paths[0])).shape == (40, 60, 3)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is a file, expected a folder"):
        segmenter(image).save(tmp_path / "file", "a")


def test_the_public_names_have_their_types(tmp_path):
    """What `from internimage_deploy import ...` gives is known to a type checker, not `Any`."""
    script = tmp_path / "script.py"
    script.write_text(
        "import internimage_deploy\n"
        "from internimage_deploy import Segmenter\n"
        "result = Segmenter.load('m.onnx')('a.png')\n"
        "reveal_type(result)\n"
        "result.no_such_attribute\n"
        "reveal_type(internimage_deploy.evaluate('m.onnx', 'images', 'labels'))\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    ).stdout
    assert 'Revealed type is "internimage_deploy.runtime.imaging.segmentation.Segmentation"' in found
    assert 'has no attribute "no_such_attribute"' in found
    assert 'Revealed type is "internimage_deploy.runtime.evaluation.result.Evaluation"' in found
    assert {"Segmenter", "UserError"} <= set(dir(internimage_deploy))


@pytest.mark.parametrize("window", [None, Window((32, 64), (24, 40))], ids=["whole", "sliding"])
def test_probabilities_are_the_softmax_of_the_logits_at_the_images_size(tmp_path, window):
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx", labels=False), "onnxruntime", window=window)
    image, _ = picture(45, 71)
    found = segmenter.probabilities(image)
    assert (found.shape, found.dtype) == ((3, 45, 71), np.float32)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(0), segmenter(image).labels)
    if window is None:
        torch = pytest.importorskip("torch")
        prepared = segmenter.prepare(image)
        (logits,) = segmenter.forward([prepared])
        scaled = torch.from_numpy(logits)[None]
        for size in (prepared.geometry.network, prepared.geometry.image):
            scaled = torch.nn.functional.interpolate(scaled, size=size, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(found, torch.softmax(scaled, 1)[0].numpy(), atol=1e-4)


def test_a_model_of_labels_has_no_probabilities(tmp_path):
    with pytest.raises(UserError, match="export it with --emit logits"):
        Segmenter.load(color_model(tmp_path / "m.onnx", labels=True), "onnxruntime").probabilities(picture(8, 8)[0])


def test_small_edges_of_the_api(tmp_path):
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx"), "onnxruntime")
    assert segmenter.forward([]) == []
    assert segmenter([]) == []
    with pytest.raises(UserError, match="mask is 'colour', expected one of indexed, ids, color"):
        segmenter(picture(8, 8)[0]).mask("colour")
    with pytest.raises(UserError, match=r"File name too long|no such file"):
        segmenter("x" * 5000)
    wide = segmenter(picture(1, 70_000)[0])
    with pytest.raises(UserError, match=r"70000x1: a JPEG file holds at most 65535 pixels a side"):
        wide.encode(ResultOptions(overlay=True, overlay_format="jpeg"), {})
    segmenter.close()
    segmenter.close()
