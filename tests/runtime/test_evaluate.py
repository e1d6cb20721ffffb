# SPDX-License-Identifier: Apache-2.0
"""Counts, metrics and bad input of `evaluate`; the official layouts are in test_layouts.py."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import internimage_deploy
from internimage_deploy import Segmenter, UserError
from internimage_deploy.runtime.evaluation.counting import count_pairs
from internimage_deploy.runtime.evaluation.result import Evaluation
from support.tiny_models import color_model

COLORS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)


def scene(seed, size=(40, 56)):
    """Blocks of colour, and a label map that is wrong in places and ignores some pixels."""
    rng = np.random.default_rng(seed)
    shown = np.kron(rng.integers(0, 3, (size[0] // 8, size[1] // 8)), np.ones((8, 8), int))
    labels = np.where(rng.random(shown.shape) < 0.2, rng.integers(0, 3, shown.shape), shown).astype(np.uint8)
    labels[rng.random(shown.shape) < 0.1] = 255
    return COLORS[shown], labels


@pytest.fixture
def data(tmp_path):
    """Five images in folders of two levels, with label maps as grey and as palette files."""
    for index in range(5):
        image, labels = scene(index, (40, 56) if index % 2 else (48, 40))
        stem = f"day/{index}" if index == 4 else str(index)
        for folder in ("images", "labels"):
            (tmp_path / folder / stem).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"{stem}.png")
        coded = Image.fromarray(labels)
        if index == 1:
            coded.putpalette([value for value in range(255, -1, -1) for _ in range(3)])
        coded.save(tmp_path / "labels" / f"{stem}.png")
    return tmp_path


def counted(model, data, **options):
    """Pixels by true and predicted class, one by one."""
    counts = [[0] * 3 for _ in range(3)]
    ignored = 0
    with Segmenter.load(model, "onnxruntime", **options) as segmenter:
        for path in sorted((data / "images").rglob("*.png")):
            predicted = segmenter(path).labels.tolist()
            true = np.asarray(Image.open(data / "labels" / path.relative_to(data / "images"))).tolist()
            for true_row, predicted_row in zip(true, predicted, strict=True):
                for t, p in zip(true_row, predicted_row, strict=True):
                    if t == 255:
                        ignored += 1
                    else:
                        counts[t][p] += 1
    return counts, ignored


def command(run, model, data, *options):
    return run(
        "evaluate",
        model,
        "--images",
        data / "images",
        "--labels",
        data / "labels",
        "--backend",
        "onnxruntime",
        *options,
    )


def test_the_metrics_of_a_case_worked_by_hand():
    """Class b is never predicted, c is nowhere true, d is in neither and left out of every mean."""
    confusion = np.array([[3, 0, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = Evaluation("m", "folder", ("a", "b", "c", "d"), confusion, 7, 1)
    # a: 3 right, 4 true, 5 predicted, 6 in either; b: 0 of 2; c: 0 of 1 predicted.
    np.testing.assert_array_equal(result.iou, [3 / 6, 0, 0, math.nan])
    np.testing.assert_array_equal(result.accuracy, [3 / 4, 0, math.nan, math.nan])
    assert result.miou == (3 / 6 + 0 + 0) / 3
    assert result.macc == (3 / 4 + 0) / 2
    assert result.aacc == 3 / 6
    lines = result.table()
    assert [line.split()[0] for line in lines] == ["class", "b", "c", "a", "1", "mean"]
    assert lines[3].split() == ["a", "50.00%", "75.00%", "66.67%"]
    assert "1 further classes occur neither" in lines[4]


def test_predictions_beyond_the_classes_of_the_data_set_count_against_the_true_class():
    """As in mmsegmentation: a head of 5 classes on a data set of 2."""
    confusion = np.array([[6, 1, 0, 0, 1], [0, 2, 2, 0, 0]])
    result = Evaluation("m", "folder", ("a", "b"), confusion, 0, 1)
    np.testing.assert_array_equal(result.iou, [6 / 8, 2 / 5])
    np.testing.assert_array_equal(result.accuracy, [6 / 8, 2 / 4])


def test_counting_pixel_by_pixel(monkeypatch):
    monkeypatch.setattr("internimage_deploy.runtime.evaluation.counting._CHUNK", 64)
    rng = np.random.default_rng(0)
    truth, labels = rng.integers(0, 5, (33, 20), np.int32), rng.integers(0, 6, (33, 20), np.uint8)
    expected = np.zeros((5, 6), np.int64)
    for t, p in zip(truth.ravel(), labels.ravel(), strict=True):
        expected[t, p] += 1
    found = count_pairs(truth, labels, 4, 6)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "options", [(), ("--batch", "3"), ("--slide", "--crop", "32x32"), ("--scales", "0.5,1", "--flip")], ids=str
)
def test_the_command_counts_exactly(run, model, data, options):
    code, out, err = command(run, model, data, "--json", data / "r.json", *options)
    assert (code, err) == (0, "")
    found = json.loads((data / "r.json").read_text())
    python = {"()": {}, "--batch": {}, "--slide": {"window": internimage_deploy.Window((32, 32), (21, 21))},
              "--scales": {"scales": (0.5, 1.0), "flip": True}}  # fmt: skip
    counts, ignored = counted(model, data, **python[options[0] if options else "()"])
    assert (found["confusion"], found["ignored_pixels"], found["images"]) == (counts, ignored, 5)
    true, predicted = [sum(row) for row in counts], [sum(column) for column in zip(*counts, strict=True)]
    iou = [counts[c][c] / (true[c] + predicted[c] - counts[c][c]) for c in range(3)]
    assert [entry["IoU"] for entry in found["classes"]] == iou
    assert found["mIoU"] == pytest.approx(sum(iou) / 3, abs=1e-15)
    assert found["mAcc"] == pytest.approx(sum(counts[c][c] / true[c] for c in range(3)) / 3, abs=1e-15)
    assert found["aAcc"] == sum(counts[c][c] for c in range(3)) / sum(true)
    assert f"5 images: mIoU {found['mIoU']:.4f}" in out
    assert "images per second" in out
    rows = [line.split()[0] for line in out.splitlines() if line.split()[0] in ("red", "green", "blue")]
    assert rows == [name for _, name in sorted(zip(iou, ("red", "green", "blue"), strict=True))]


def test_the_python_api(model, data):
    result = internimage_deploy.evaluate(model, data / "images", str(data / "labels"), backend="onnxruntime", batch=2)
    assert isinstance(result, internimage_deploy.Evaluation)
    counts, ignored = counted(model, data)
    assert (result.confusion.tolist(), result.ignored, result.dataset) == (counts, ignored, "folder")
    assert (result.failed, result.against, result.changes()) == ((), None, [])
    assert f"mIoU {result.miou:.4f}" in repr(result)


def test_two_models_on_the_same_images(run, model, data, tmp_path):
    """The second one takes red for green: of the classes, these change."""
    other = color_model(tmp_path / "other.onnx", classes=("green", "red", "blue"))
    import onnx
    from onnx import numpy_helper

    changed = onnx.load(other)
    for tensor in changed.graph.initializer:
        if tensor.name == "weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[[1, 0, 2]].copy(), "weight"))
        if tensor.name == "bias":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[[1, 0, 2]].copy(), "bias"))
    onnx.save(changed, other)
    code, out, _ = command(run, model, data, "--against", other, "--json", data / "r.json")
    assert code == 0
    found = json.loads((data / "r.json").read_text())
    assert found["confusion"] == counted(model, data)[0]
    assert found["against"]["confusion"] == counted(other, data)[0]
    same = total = 0
    with Segmenter.load(model, "onnxruntime") as first, Segmenter.load(other, "onnxruntime") as second:
        for path in (data / "images").rglob("*.png"):
            pair = first(path).labels == second(path).labels
            same, total = same + int(pair.sum()), total + pair.size
    assert found["agreement"] == same / total
    assert 0 < same < total
    assert [row["class"] for row in found["changes"]][-1] == "blue"
    assert "of the labels agree; mIoU" in out
    assert "IoU of the classes that differ most" in out


def test_a_model_agrees_with_itself(run, model, data):
    code, out, _ = command(run, model, data, "--against", model)
    assert (code, "100.0000% of the labels agree" in out, "differ most" in out) == (0, True, False)


def test_a_run_that_ended_early_goes_on(run, model, data, monkeypatch):
    whole = data / "whole.json"
    assert command(run, model, data, "--json", whole)[0] == 0
    lines = (data / "whole.images.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 6
    (data / "part.images.jsonl").write_text("".join(lines[:3]) + lines[3][:9])  # cut off within a line
    for path in (data / "images" / "0.png", data / "images" / "1.png"):  # those that are done are not read again
        path.write_bytes(b"")
    code, out, err = command(run, model, data, "--json", data / "part.json", "--resume")
    assert (code, err) == (0, "")
    first, second = (json.loads((data / name).read_text()) for name in ("whole.json", "part.json"))
    assert {**first, "images_per_second": 0} == {**second, "images_per_second": 0}
    assert (data / "part.images.jsonl").read_text() == "".join(lines)
    code, out, _ = command(run, model, data, "--json", data / "part.json", "--resume")
    assert (code, "images per second" in out) == (0, False)
    code, _, err = command(run, model, data, "--json", data / "part.json", "--resume", "--flip")
    assert (code, "counts of another evaluation (flip differs); leave --resume out to start over" in err) == (1, True)
    (data / "part.images.jsonl").write_text("".join(lines[:2]) + "{}}\n" + lines[3])
    code, _, err = command(run, model, data, "--json", data / "part.json", "--resume")
    assert (code, "line 3 is damaged" in err) == (1, True)
    code, _, err = command(run, model, data, "--resume")
    assert (code, "name that with --json" in err) == (1, True)


def test_images_that_fail_are_named_and_the_others_count(run, model, data):
    labels = data / "labels"
    Image.fromarray(scene(1)[1][:30]).save(labels / "1.png")
    Image.fromarray(np.repeat(scene(2, (48, 40))[1][..., None], 3, 2)).save(labels / "2.png")
    wrong = scene(3)[1]
    wrong[:2, :2], wrong[3, 3] = 77, 9
    Image.fromarray(wrong).save(labels / "3.png")
    (data / "images" / "day" / "4.png").write_bytes(b"no image")
    code, out, err = command(run, model, data, "--json", data / "r.json")
    assert code == 1
    assert f"1.png: {labels}/1.png: 56x30, its image is 56x40 pixels; expected a label map of the image's size" in err
    assert f"{labels}/2.png: 3 channels (RGB), expected a label map of one channel" in err
    assert f"{labels}/3.png: 5 pixels of value 9, 77, which is none of the 3 classes" in err
    assert "--ignore-unknown" in err
    assert "4.png: not an image in a known format" in err
    assert "error: 4 of 5 images could not be evaluated; they are named above" in err
    assert "1 images: mIoU" in out
    found = json.loads((data / "r.json").read_text())
    assert (found["images"], len(found["failed"])) == (1, 4)
    Image.fromarray(scene(1)[1]).save(labels / "1.png")
    code, out, err = command(run, model, data, "--json", data / "r.json", "--resume", "--ignore-unknown")
    assert (code, "ignore_unknown differs" in err) == (1, True)
    code, out, err = command(run, model, data, "--json", data / "r.json", "--resume")
    assert (code, "2 images: mIoU" in out, "3 of 5 images" in err) == (1, True, True)
    code, out, err = command(run, model, data, "--ignore-unknown")
    assert (code, "3 images: mIoU" in out, "3.png" in err) == (1, True, False)


def test_unknown_values_count_as_ignored_only_when_told_so(model, data):
    (data / "images" / "day" / "4.png").unlink()
    before = internimage_deploy.evaluate(model, data / "images", data / "labels", backend="onnxruntime")
    wrong = np.asarray(Image.open(data / "labels" / "3.png")).copy()
    wrong[wrong == 255] = 200
    Image.fromarray(wrong).save(data / "labels" / "3.png")
    with_ignored = internimage_deploy.evaluate(
        model, data / "images", data / "labels", backend="onnxruntime", ignore_unknown=True
    )
    np.testing.assert_array_equal(with_ignored.confusion, before.confusion)
    assert with_ignored.ignored == before.ignored
    failed = internimage_deploy.evaluate(model, data / "images", data / "labels", backend="onnxruntime").failed
    assert [source for source, _ in failed] == [str(data / "images" / "3.png")]


def test_label_maps_of_16_bits(model, data):
    before = internimage_deploy.evaluate(model, data / "images", data / "labels", backend="onnxruntime")
    for path in (data / "labels").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)).save(path)
    after = internimage_deploy.evaluate(model, data / "images", data / "labels", backend="onnxruntime")
    np.testing.assert_array_equal(after.confusion, before.confusion)


def test_what_is_missing_is_told_before_anything_runs(run, model, data):
    (data / "labels" / "3.png").unlink()
    (data / "labels" / "2.png").unlink()
    code, _, err = command(run, model, data)
    images = data / "images"
    assert code == 1
    assert f"2 of 5 images have no label map: {images}/2.png, {images}/3.png; expected {data}/labels/2.png" in err
    code, out, err = command(run, model, data, "--skip-unlabeled")
    assert (code, "note: 2 images without a label map are left out" in err, "3 images: mIoU" in out) == (0, True, True)
    (data / "empty").mkdir()
    for images, labels, message in (
        ("images", "empty", "no label map here, expected files ending in .png"),
        ("empty", "labels", "no image here"),
        ("images", "none", "no label map here"),
        ("images", "images", "both --images and --labels"),
        ("images/day", "labels/day", ""),
    ):
        code, _, err = run("evaluate", model, "--images", data / images, "--labels", data / labels)
        assert (code, message in err) == (0 if not message else 1, True), (images, labels, err)
    for path in (data / "labels").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    code, _, err = command(run, model, data, "--skip-unlabeled")
    assert (code, "error: " in err, "3 channels (RGB)" in err) == (1, True, True)


def test_a_list_of_images(run, model, data):
    (data / "list.txt").write_text("images/1.png\nimages/3.png\n")
    options = ("--labels", data / "labels", "--backend", "onnxruntime")
    code, out, _ = run("evaluate", model, "--images", data / "list.txt", *options)
    assert (code, "2 images: mIoU" in out) == (0, True)
    (data / "list.txt").write_text("images/1.png\nimages/x.png\n")
    code, _, err = run("evaluate", model, "--images", data / "list.txt", *options)
    assert (code, f"x.png: no such file; named in {data}/list.txt" in err) == (1, True)


@pytest.mark.parametrize(
    "line", ['{"image": "0"}', '{"image": "0", "counts": [[[9, 0, 1]]]}', '{"image": "0", "counts": 1}']
)
def test_damaged_counts_are_not_taken(run, model, data, line):
    assert command(run, model, data, "--json", data / "r.json")[0] == 0
    head = (data / "r.images.jsonl").read_text().splitlines()[0]
    (data / "r.images.jsonl").write_text(f"{head}\n{line}\n")
    code, _, err = command(run, model, data, "--json", data / "r.json", "--resume")
    assert (code, "the counts of 0 are damaged; leave --resume out to start over" in err) == (1, True)


def test_a_result_that_cannot_be_written_is_told_before_the_network_runs(run, model, data):
    code, out, err = command(run, model, data, "--json", data / "nowhere" / "r.json")
    assert (code, "its folder does not exist" in err, "mIoU" in out) == (1, True, False)


def test_a_split_names_the_images(run, model, data):
    (data / "list.txt").write_text("1\n3\nday/4\n")
    code, out, err = command(run, model, data, "--split", data / "list.txt")
    assert (code, "3 images: mIoU" in out, "note: 3 images of " in err) == (0, True, True)
    (data / "list.txt").write_text("1\nnowhere\n")
    code, _, err = command(run, model, data, "--split", data / "list.txt")
    assert (code, "1 of its 2 images are not in" in err, "nowhere" in err) == (1, True, True)
    (data / "list.txt").write_text("\n")
    assert "an empty list" in command(run, model, data, "--split", data / "list.txt")[2]


def test_a_score_that_is_too_low_fails(run, model, data):
    code, out, err = command(run, model, data, "--at-least", "0.99")
    assert (code, "mIoU" in out, "expected at least 0.99" in err) == (1, True, True)


def test_options_of_a_cluster_need_one(run, model, data):
    code, _, err = command(run, model, data, "--replicas", "2")
    assert (code, "--replicas has no effect on this machine alone; add --executor ray" in err) == (2, True)
    code, _, err = command(run, model, data, "--executor", "ray", "--against", model)
    assert (code, "--against runs on one machine; leave --executor out" in err) == (2, True)


def test_models_of_other_classes_are_not_compared(run, model, data, tmp_path):
    other = color_model(tmp_path / "four.onnx", classes=("red", "green", "blue", "black"))
    code, _, err = command(run, model, data, "--against", other)
    assert (code, "3 and 4 classes; nothing to compare" in err) == (1, True)


def test_label_maps_that_segment_wrote_score_full(run, data, tmp_path):
    model = color_model(tmp_path / "m.onnx")
    assert (
        run("segment", model, data / "images", "-o", data / "made", "--recursive", "--backend", "onnxruntime")[0] == 0
    )
    result = internimage_deploy.evaluate(model, data / "images", data / "made", backend="onnxruntime")
    assert (result.miou, result.aacc, result.images) == (1.0, 1.0, 5)


def test_a_folder_without_a_readable_image_fails_with_the_reason(data, model):
    for path in (data / "images").rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"none of 5 images; first .*not an image in a known format"):
        internimage_deploy.evaluate(model, data / "images", data / "labels", backend="onnxruntime")
