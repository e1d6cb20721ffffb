# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest

from internimage_deploy import Segmenter, UserError
from internimage_deploy.runtime.imaging.postprocess import labels_from_logits, labels_from_planes
from internimage_deploy.runtime.imaging.preprocess import Geometry
from internimage_deploy.runtime.imaging.sliding import crops, planes_of_crops
from internimage_deploy.window import Window
from support.tiny_models import color_model, picture


def from_crops(logits, places, geometry):
    return labels_from_planes(planes_of_crops(logits, places, geometry), len(logits[0]), geometry)


def spans(size, crop, stride):
    return [(s.start, s.stop) for s, _ in crops((size, 1), Window((crop, 1), (stride, 1)))]


def test_crops_end_at_the_border():
    assert spans(64, 64, 32) == [(0, 64)]
    assert spans(100, 64, 40) == [(0, 64), (36, 100)]
    assert spans(104, 64, 40) == [(0, 64), (40, 104)]
    assert spans(105, 64, 40) == [(0, 64), (40, 104), (41, 105)]
    assert spans(40, 64, 40) == [(0, 40)]


@pytest.mark.parametrize(("crop", "stride"), [((64, 64), (0, 32)), ((64, 64), (65, 32))])
def test_a_stride_must_cover_the_picture(crop, stride):
    with pytest.raises(UserError, match="expected strides from 1 to the crop's size"):
        Window(crop, stride)


@pytest.mark.parametrize("size", [(96, 160), (64, 64), (128, 96)])
def test_labels_equal_a_plain_average_over_all_pixels(size):
    """The reference holds every class at full size, as mmsegmentation does."""
    rng = np.random.default_rng(3)
    window, image = Window((64, 64), (42, 42)), (75, 131)
    places = crops(size, window)
    logits = [rng.standard_normal((7, 16, 16)).astype(np.float32) for _ in places]
    total, count = np.zeros((7, *size), np.float32), np.zeros(size, np.float32)
    for crop, (rows, columns) in zip(logits, places, strict=True):
        total[:, rows, columns] += np.stack([cv2.resize(plane, (64, 64)) for plane in crop])
        count[rows, columns] += 1
    assert count.min() >= 1
    full = np.stack([cv2.resize(plane, image[::-1]) for plane in total / count])
    ordered = np.sort(full, axis=0)
    clear = ordered[-1] - ordered[-2] > 1e-4
    labels = from_crops(logits, places, Geometry(image, size, size, size))
    np.testing.assert_array_equal(labels[clear], full.argmax(axis=0)[clear])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(value):
    window, size = Window((64, 64), (42, 42)), (96, 160)
    places = crops(size, window)
    logits = [np.zeros((3, 16, 16), np.float32) for _ in places]
    logits[-1][1, 8, 8] = value
    with pytest.raises(UserError, match="the network produced NaN or infinity"):
        from_crops(logits, places, Geometry(size, size, size, size))
    with pytest.raises(UserError, match="the network produced NaN or infinity"):
        labels_from_logits(logits[-1], Geometry((64, 64), (64, 64), (64, 64), (64, 64)))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("hw", [(130, 200), (40, 50), (64, 300)], ids=["larger", "smaller", "flat"])
def test_a_local_model_answers_the_same_through_a_window(tmp_path, hw, batch):
    """The color model looks at 4x4 pixels, so a window that starts on multiples of 4 changes nothing."""
    image, _ = picture(*hw)
    whole = Segmenter.load(color_model(tmp_path / "free.onnx"))(image).labels
    free = Segmenter.load(tmp_path / "free.onnx", window=Window((64, 64), (44, 44)), batch=batch)(image).labels
    fixed = Segmenter.load(color_model(tmp_path / "fixed.onnx", size=(64, 64)), window="slide", batch=batch)(image)
    assert (free == whole).mean() > 0.97
    assert (fixed.labels == whole).mean() > 0.97


def test_what_cannot_slide_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"returns labels; export it with --emit logits$"):
        Segmenter.load(color_model(tmp_path / "a.onnx", labels=True, inner="x", size=(64, 64)), window="slide")
    with pytest.raises(UserError, match="give the crop"):
        Segmenter.load(color_model(tmp_path / "b.onnx"), window="slide")
    with pytest.raises(UserError, match="expects multiples of 32"):
        Segmenter.load(tmp_path / "b.onnx", window=Window((60, 60), (40, 40)))
    with pytest.raises(UserError, match="expects 64x64"):
        Segmenter.load(color_model(tmp_path / "c.onnx", size=(64, 64)), window=Window((96, 96), (64, 64)))


@pytest.mark.parametrize(
    ("window", "divisor"),
    [(Window((64, 64), (1, 32)), 32), (Window((64, 64), (7, 7)), 32), (Window((1, 1), (1, 1)), 1)],
    ids=["a stride of 1", "many small strides", "crops of 1"],
)
def test_a_window_of_crops_without_end_is_refused_in_one_line(tmp_path, window, divisor):
    """Both come with the model's file, so they are not the user's choice."""
    path = color_model(tmp_path / "m.onnx", window=window, card_changes={"size_divisor": divisor})
    pipeline = Segmenter.load(path).pipeline
    with pytest.raises(UserError, match=r"would run [0-9,]+ crops of .* use a larger stride or crop$") as error:
        pipeline.prepare(np.zeros((1024, 1024, 3), np.uint8))
    assert "\n" not in str(error.value)


def test_a_stride_of_an_eighth_of_the_crop_is_not_too_many(tmp_path):
    pipeline = Segmenter.load(color_model(tmp_path / "m.onnx", window=Window((64, 64), (8, 8)))).pipeline
    assert pipeline.prepare(np.zeros((1024, 32, 3), np.uint8)).crop_count == 121
    assert pipeline.prepare(np.zeros((1024, 1024, 3), np.uint8)).crop_count == 121**2
