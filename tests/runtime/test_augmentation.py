# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation against mmsegmentation's `aug_test`, written out in PyTorch on the exporter's own models."""

import dataclasses
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image

from internimage_deploy import Segmenter, UserError
from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD, EngineInfo
from internimage_deploy.onnx_tools.model_file import read_card
from internimage_deploy.runtime.imaging.augmentation import Augmentation
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.window import Window
from support.exports import DYNAMIC_LABELS, MODELS, STATIC
from support.tiny_models import color_model, picture
from support.windows import with_window

torch = pytest.importorskip("torch", reason="pip install '.[export]'")

SCALES = (0.5, 1.0, 1.75)
WINDOW = Window((64, 96), (40, 52))


def noise(size):
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(size[::-1])
    return np.clip(np.asarray(coarse) + rng.normal(0, 25, (*size, 3)), 0, 255).astype(np.uint8)


def upsampled(logits, size):
    return torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)


def normalised(image):
    batch = (image.astype(np.float32) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return torch.from_numpy(np.ascontiguousarray(batch.transpose(2, 0, 1)))[None]


def whole(model, image):
    return upsampled(model(normalised(image)), image.shape[:2])


def slide(model, image):
    height, width = image.shape[:2]
    starts = [
        sorted({min(start, max(side - crop, 0)) for start in range(0, max(side - crop, 0) + stride, stride)})
        for side, crop, stride in zip((height, width), WINDOW.crop, WINDOW.stride, strict=True)
    ]
    total, count = 0, torch.zeros(1, 1, height, width)
    for top, left in itertools.product(*starts):
        crop = image[top : top + WINDOW.crop[0], left : left + WINDOW.crop[1]]
        place = (slice(top, top + crop.shape[0]), slice(left, left + crop.shape[1]))
        logits = whole(model, crop)
        placed = torch.zeros(1, logits.shape[1], height, width)
        placed[:, :, place[0], place[1]] = logits
        count[:, :, place[0], place[1]] += 1
        total = total + placed
    return total / count


def augmented(model, image, resize, scales, flip, infer):
    """(classes, H, W): mean softmax over the views."""
    height, width = image.shape[:2]
    views = []
    for scale in scales:
        limit = [int(side * scale) for side in resize or (width, height)]
        factor = min(max(limit) / max(height, width), min(limit) / min(height, width))
        resized = cv2.resize(image, (int(width * factor + 0.5), int(height * factor + 0.5)))
        network = [-(-side // 32) * 32 for side in resized.shape[:2]]
        resized = cv2.resize(resized, network[::-1])
        for turned in (False, True)[: 1 + flip]:
            with torch.inference_mode():
                logits = infer(model, np.ascontiguousarray(resized[:, ::-1]) if turned else resized)
                scores = upsampled(logits, (height, width)).softmax(1)
            views.append(scores.flip(3) if turned else scores)
    return (sum(views) / len(views))[0].numpy()


@pytest.fixture(scope="module")
def network():
    return MODELS[DYNAMIC_LABELS[0]]().eval()


@pytest.mark.parametrize(
    ("backend", "window", "resize", "scales", "flip", "batch"),
    [
        ("onnxruntime", None, (160, 128), SCALES, True, 1),
        ("onnxruntime", None, (160, 128), SCALES, False, 1),
        ("openvino", None, (160, 128), (), True, 4),
        ("onnxruntime", None, None, (0.75, 1.3), True, 2),
        ("onnxruntime", WINDOW, (192, 128), SCALES, True, 3),
    ],
    ids=["scales and flip", "scales", "flip", "own size", "slide"],
)
def test_probabilities_and_labels_are_those_of_pytorch(
    exports, network, tmp_path, backend, window, resize, scales, flip, batch
):
    """Of a file that returns labels: its logits become the output while it is loaded."""
    path = with_window(exports(*DYNAMIC_LABELS).path, tmp_path / "m.onnx", window, resize=resize)
    image = noise((90, 143))
    expected = augmented(network, image, resize, scales or (1.0,), flip, slide if window else whole)
    with Segmenter.load(path, backend, scales=scales, flip=flip, batch=batch) as segmenter:
        assert not segmenter.card.emits_labels
        found = segmenter.probabilities(image)
        labels = segmenter(image).labels
    np.testing.assert_allclose(found, expected, atol=1e-3)
    second, best = np.sort(expected, axis=0)[-2:]
    clear = best - second > 2e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(labels[clear], expected.argmax(0)[clear])
    assert labels.dtype == np.uint8
    plain = Segmenter.load(path, "onnxruntime")(image).labels
    assert (plain != labels).mean() > 0.005  # the augmentation is no empty one


def test_a_model_of_fixed_size_flips_the_part_that_shows_the_image(exports):
    """Padding stays on the right and below, as in mmsegmentation, which mirrors before it pads."""
    model = MODELS[STATIC[0]]().eval()
    image = noise((50, 40))  # becomes 64x51 of 64x96
    small = cv2.resize(image, (51, 64))
    views = []
    for turned in (False, True):
        canvas = np.empty((64, 96, 3), np.uint8)
        canvas[:] = np.rint(IMAGENET_MEAN).astype(np.uint8)
        canvas[:, :51] = small[:, ::-1] if turned else small
        with torch.inference_mode():
            scores = upsampled(whole(model, canvas)[:, :, :, :51], (50, 40)).softmax(1)
        views.append(scores.flip(3) if turned else scores)
    found = Segmenter.load(exports(*STATIC).path, "onnxruntime", flip=True).probabilities(image)
    np.testing.assert_allclose(found, (sum(views) / 2)[0].numpy(), atol=1e-3)


def test_what_cannot_be_augmented_says_what_works(tmp_path):
    fixed = color_model(tmp_path / "fixed.onnx", size=(64, 64))
    with pytest.raises(UserError, match=r"takes one size, 64x64, so scales .*--flip alone.*--slide.*any size"):
        Segmenter.load(fixed, "onnxruntime", scales=(0.5, 1.0))
    image, labels = picture(100, 150)
    for options in ({"flip": True}, {"scales": (0.5, 1.0), "window": "slide"}):
        assert (Segmenter.load(fixed, "onnxruntime", **options)(image).labels == labels).mean() > 0.9
    without = color_model(tmp_path / "without.onnx", labels=True, inner="x")
    with pytest.raises(
        UserError, match=r"averages probabilities, and this model returns labels; export it with --emit"
    ):
        Segmenter.load(without, "onnxruntime", flip=True)
    card = dataclasses.replace(read_card(without), engine=EngineInfo("tensorrt", "10.14", "", ()))
    with pytest.raises(UserError, match="build the engine from an export with --emit logits"):
        ImagePipeline(card, augmentation=Augmentation((1.0,), True))


@pytest.mark.parametrize("scales", [(0.0,), (-1.0,), (float("nan"),), (9.0,), (1.0,) * 17, ("1",), (True,)])
def test_scales_that_are_none_are_rejected(scales):
    with pytest.raises(UserError, match=r"scales is .*, expected up to 16 factors above 0 and up to 8"):
        LoadOptions(scales=scales)


def test_a_view_that_is_too_large_is_rejected(tmp_path):
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx"), "onnxruntime", max_pixels=2_000_000, scales=(1.0, 4.0))
    with pytest.raises(UserError, match=r"would be 3200x3200, the limit is 2,000,000 pixels.*smaller resize or scale"):
        segmenter.prepare(picture(800, 800)[0])


def test_an_image_too_large_for_the_memory_fails_alone(tmp_path, monkeypatch):
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx"), "onnxruntime", flip=True)

    def full(views):
        raise MemoryError

    monkeypatch.setattr(segmenter.pipeline, "mean_probabilities", full)
    with pytest.raises(UserError, match="not enough memory for the probabilities of 40x30 pixels and 3 classes"):
        segmenter(picture(30, 40)[0])


def test_the_command(run, tmp_path):
    model = color_model(tmp_path / "m.onnx", labels=True)
    image, labels = picture(60, 100)
    Image.fromarray(image).save(tmp_path / "i.png")
    out = tmp_path / "out"
    code, _, err = run(
        "segment", model, tmp_path / "i.png", "-o", out, "--scales", "0.5,1,1.5", "--flip", "--backend", "onnxruntime"
    )
    assert (code, err) == (0, "")
    assert (np.asarray(Image.open(out / "i.labels.png")) == labels).mean() > 0.95
    code, _, err = run("segment", model, tmp_path / "i.png", "-o", out, "--scales", "0.5;1")
    assert (code, "got '0.5;1', expected factors such as 0.5,0.75" in err) == (2, True)


def test_images_that_fail_leave_the_others_alone(tmp_path):
    """One image's views fail; `forward_each` tells of it and goes on."""
    segmenter = Segmenter.load(color_model(tmp_path / "m.onnx"), "onnxruntime", flip=True)
    prepared = [segmenter.prepare(picture(64, 64)[0]) for _ in range(3)]
    run, calls = segmenter.backend.run, itertools.count()

    def fail_once(batch):
        if next(calls) in (2, 3, 4):  # the second image's first view, started and run again alone
            raise UserError("no")
        return run(batch)

    segmenter.backend.run = fail_once
    failed = []
    done = list(
        segmenter.forward_each(
            [[(i, image)] for i, image in enumerate(prepared)],
            lambda group, error: failed.append((group[0][0], str(error))),
        )
    )
    assert failed == [(1, "no")]
    assert [group[0][0] for group, _ in done] == [0, 2]
