# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples" / "toy_street"
CHECKPOINT = FOLDER / "toy_street.pth"
sys.path.insert(0, str(FOLDER))

import recipe  # noqa: E402 (the example's folder is not a package)
import scenes  # noqa: E402
from score import Score  # noqa: E402

from internimage_deploy import evaluate  # noqa: E402
from internimage_deploy.exporter.checkpoint import read_checkpoint  # noqa: E402
from internimage_deploy.exporter.export import export  # noqa: E402
from internimage_deploy.onnx_tools.graph import Graph, save  # noqa: E402
from internimage_deploy.onnx_tools.model_file import read_model  # noqa: E402
from internimage_deploy.runtime.backends import cpu_graph  # noqa: E402
from internimage_deploy.runtime.engine.precision import convert  # noqa: E402
from internimage_deploy.runtime.segmenter import Segmenter  # noqa: E402


@pytest.fixture(scope="module")
def sample():
    return [scenes.scene(seed) for seed in range(scenes.FIRST_HELD_OUT, scenes.FIRST_HELD_OUT + 12)]


def test_a_seed_gives_the_same_scene_every_time(sample):
    again = scenes.scene(scenes.FIRST_HELD_OUT)
    assert np.array_equal(again.image, sample[0].image)
    assert np.array_equal(again.labels, sample[0].labels)
    assert not np.array_equal(sample[0].image, sample[1].image)


@pytest.mark.parametrize("size", [scenes.SIZE, (96, 160)], ids=["default size", "other size"])
def test_image_and_labels_have_the_requested_size(size):
    made = scenes.scene(3, size)
    assert made.image.shape == (*size, 3)
    assert made.image.dtype == np.uint8
    assert made.labels.shape == size
    assert made.labels.dtype == np.uint8


def test_every_class_occurs_and_none_rules(sample):
    labels = np.concatenate([made.labels.ravel() for made in sample])
    fractions = np.bincount(labels, minlength=len(scenes.CLASSES)) / labels.size
    assert len(fractions) == len(scenes.CLASSES) == len(scenes.PALETTE)
    assert fractions.min() > 0.003
    assert fractions.max() < 0.5


def test_labels_follow_the_image(sample):
    # Colour edges must be commoner on label borders than inside a region: labels shifted against the image fail this.
    on_border, inside = [], []
    for made in sample:
        grey = made.image.mean(axis=2)
        step = np.abs(np.diff(grey, axis=1))
        border = np.diff(made.labels.astype(int), axis=1) != 0
        on_border.append(step[border].mean())
        inside.append(step[~border].mean())
    assert np.mean(on_border) > 3 * np.mean(inside)


def test_colour_alone_does_not_give_the_class(sample):
    # The best a lookup from colour (16 levels a channel, learnt on these very scenes) can do stays far from the truth.
    colours = np.concatenate([made.image.reshape(-1, 3) for made in sample]).astype(int) // 16
    labels = np.concatenate([made.labels.ravel() for made in sample])
    counts = np.zeros((4096, len(scenes.CLASSES)))
    np.add.at(counts, (colours @ (256, 16, 1), labels), 1)
    assert counts.max(axis=1).sum() / labels.size < 0.75


def test_painting_in_processes_gives_the_same_scenes(sample):
    made = scenes.scenes(range(scenes.FIRST_HELD_OUT, scenes.FIRST_HELD_OUT + 3), workers=2)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(made, sample, strict=False))


def test_scenes_are_written_as_images_with_indexed_labels(tmp_path):
    command = [sys.executable, str(FOLDER / "scenes.py"), str(tmp_path), "--count", "1", "--first", "7"]
    subprocess.run(command, check=True, capture_output=True)
    made = scenes.scene(7)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images" / "7.png")), made.image)
    coded = Image.open(tmp_path / "labels" / "7.png")
    assert np.array_equal(np.asarray(coded), made.labels)
    assert tuple(coded.getpalette()[:3]) == scenes.PALETTE[0]


def test_score_of_a_worked_example():
    score = Score(("a", "b", "c"))
    score.add(np.array([[0, 0, 1]]), np.array([[0, 1, 1]]))
    score.add(np.array([1]), np.array([0]))
    # a: 1 pixel right; true 2, predicted 2, either 3. b: 1 right; true 2, predicted 2, either 3. c: nowhere.
    assert score.iou()[:2] == pytest.approx([1 / 3, 1 / 3])
    assert np.isnan(score.iou()[2])
    assert score.mean_iou() == pytest.approx(1 / 3)
    assert score.accuracy() == pytest.approx(0.5)
    assert "a " in score.table()


def test_checkpoint_is_small_and_holds_plain_data_only():
    assert CHECKPOINT.stat().st_size <= 3_000_000
    content = torch.load(CHECKPOINT, weights_only=True)
    assert set(content) == {"meta", "state_dict"}
    assert content["meta"]["CLASSES"] == scenes.CLASSES


def test_everything_about_the_model_is_inferred_from_the_checkpoint():
    read = read_checkpoint(CHECKPOINT)
    assert read.segmentor.config == recipe.UPERNET
    assert read.classes == scenes.CLASSES
    assert read.palette == scenes.PALETTE
    assert read.resize == (scenes.SIZE[1], scenes.SIZE[0])
    assert not read.notes


def exported(path, **options):
    return export(CHECKPOINT, path, **options).path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("toy_street") / "toy_street.onnx")


@pytest.fixture(scope="module")
def plain_labels(tmp_path_factory):
    """Labels of 24 held-out scenes by the plain export in plain ONNX Runtime, and the scenes."""
    path = exported(tmp_path_factory.mktemp("plain") / "plain.onnx", size=scenes.SIZE, plain=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = [item.image for item in scenes.scenes(range(scenes.FIRST_HELD_OUT, scenes.FIRST_HELD_OUT + 24))]
    return [session.run(None, {"image": image[None]})[0][0] for image in images], images


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """24 of the 200 scenes that `make demo` scores: the folder of their images and that of their label maps."""
    folder = tmp_path_factory.mktemp("held_out")
    subprocess.run([sys.executable, str(FOLDER / "scenes.py"), str(folder), "--count", "24"], check=True)
    return folder / "images", folder / "labels"


def test_model_segments_scenes_it_has_not_seen(model, held_out):
    assert evaluate(model, *held_out).miou >= 0.80


@pytest.mark.parametrize("flip", [False, True], ids=["plain", "flip"])
def test_evaluate_is_an_independent_count_to_the_last_digit(model, held_out, flip):
    """Intersections and unions as sets of pixels, class by class, and the other counter of this folder."""
    images, labels = held_out
    true, found = [], []
    with Segmenter.load(model, backend="onnxruntime", flip=flip) as segmenter:
        for path in sorted(images.iterdir()):
            true.append(np.asarray(Image.open(labels / path.name)))
            found.append(segmenter(path).labels)
    true, found = np.stack(true), np.stack(found)
    score = Score(scenes.CLASSES)
    score.add(true, found)
    result = evaluate(model, images, labels, backend="onnxruntime", flip=flip, batch=4)
    assert (result.images, result.ignored) == (24, 0)
    np.testing.assert_array_equal(result.confusion, score.counts)
    iou, accuracy = [], []
    for index in range(len(scenes.CLASSES)):
        both = int(np.count_nonzero((true == index) & (found == index)))
        iou.append(both / int(np.count_nonzero((true == index) | (found == index))))
        accuracy.append(both / int(np.count_nonzero(true == index)))
    assert result.iou.tolist() == iou
    assert result.accuracy.tolist() == accuracy
    assert result.miou == np.mean(iou)
    assert result.macc == np.mean(accuracy)
    assert result.aacc == np.count_nonzero(true == found) / true.size


@pytest.mark.parametrize("size", [None, scenes.SIZE], ids=["free size", "fixed size"])
def test_no_rewrite_changes_a_label(model, plain_labels, size, tmp_path, monkeypatch):
    # The model is too small for Winograd's convolutions to pay: here they are made all the same.
    monkeypatch.setattr(cpu_graph, "_MIN_CHANNELS", 8)
    monkeypatch.setattr(cpu_graph, "_MIN_PIXELS", 1)
    rewritten = model if size is None else exported(tmp_path / "fixed.onnx", size=size)
    assert cpu_graph.adapt(read_model(rewritten)) >= 3
    expected, images = plain_labels
    with Segmenter.load(rewritten, backend="onnxruntime") as segmenter:
        changed = sum(
            int((segmenter(image).labels != labels).sum()) for image, labels in zip(images, expected, strict=True)
        )
    assert changed == 0


def test_the_half_precision_graph_computes_the_labels_of_the_float32_one(model, held_out, tmp_path):
    graph = Graph(onnx.load(model), model.parent)
    convert(graph, "fp16")
    half = tmp_path / "half.onnx"
    save(graph, half)
    made = [item.image for item in scenes.scenes(range(scenes.FIRST_HELD_OUT, scenes.FIRST_HELD_OUT + 24))]
    with Segmenter.load(model, backend="onnxruntime") as full, Segmenter.load(half, backend="onnxruntime") as low:
        same = [np.mean(full(image).labels == low(image).labels) for image in made]
    assert np.mean(same) >= 0.998
    assert abs(evaluate(half, *held_out).miou - evaluate(model, *held_out).miou) <= 0.003
