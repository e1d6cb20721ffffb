# SPDX-License-Identifier: Apache-2.0
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from PIL import Image

from internimage_deploy import Segmenter
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.imaging.results import LABELS, ResultOptions
from internimage_deploy.runtime.pipelines.files import ResultWriter, segment_files
from internimage_deploy.runtime.pipelines.find import find_inputs
from internimage_deploy.runtime.pipelines.storage import Location
from support.tiny_models import PALETTE, Overlapping, color_model, picture


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size in enumerate([(40, 70), (70, 40), (40, 70)]):
        Image.fromarray(picture(*size)[0]).save(folder / f"p{index}.png")
    return folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def one_error_line(stderr):
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_folder_and_a_file(run, model, pictures, tmp_path):
    Image.fromarray(picture(33, 65)[0]).save(tmp_path / "one.jpg", quality=95)
    out = tmp_path / "new" / "out"
    code, said, _ = run("segment", model, pictures, tmp_path / "one.jpg", "-o", out, "--overlay", "--json")
    assert code == 0
    assert "segmented 4 of 4 images" in said
    stems = ("one", "p0", "p1", "p2")
    assert names(out) == sorted(f"{stem}.{kind}" for stem in stems for kind in ("json", "labels.png", "overlay.png"))
    labels = Image.open(out / "p1.labels.png")
    assert (labels.mode, labels.size) == ("P", (40, 70))
    assert (np.asarray(labels) == picture(70, 40)[1]).mean() > 0.9
    assert Image.open(out / "p1.overlay.png").size == (40, 70)
    # Red stripe on the left stays red in the painted picture: channels are not swapped.
    red, green, blue = np.asarray(Image.open(out / "p1.overlay.png"))[35, 2]
    assert red > 200 > max(green, blue)
    facts = json.loads((out / "p1.json").read_text())
    assert (facts["image"], facts["width"], facts["height"]) == ("p1.png", 40, 70)
    assert sum(entry["pixels"] for entry in facts["classes"]) == 40 * 70
    assert {entry["class"] for entry in facts["classes"]} == {"red", "green", "blue"}


def test_batches_slide_and_resize_give_the_plain_answer(run, pictures, tmp_path):
    free, fixed = color_model(tmp_path / "free.onnx"), color_model(tmp_path / "fixed.onnx", size=(32, 64))
    for name, options in {
        "batch": (free, "--batch", "2", "--threads", "1", "--backend", "onnxruntime"),
        "slide": (fixed, "--slide"),
        "crop": (free, "--slide", "--crop", "32x32", "--stride", "24x24", "--resize", "128x128"),
        "own": (free, "--resize", "own"),
    }.items():
        code, _, _ = run("segment", options[0], pictures, "-o", tmp_path / name, *options[1:])
        assert code == 0
        for index, size in enumerate([(40, 70), (70, 40), (40, 70)]):
            labels = np.asarray(Image.open(tmp_path / name / f"p{index}.labels.png"))
            assert (labels == picture(*size)[1]).mean() > 0.9, name


def segmented(backend, folder):
    """{stem: labels} and {stem: error} of the pictures in `folder`."""
    errors = {}
    out = folder.parent / "segmented"

    def done(image, outcome):
        if outcome.error:
            errors[image.stem] = outcome.error

    writer = ResultWriter(Location(str(out)), ResultOptions(), "model")
    segment_files(Segmenter(backend), find_inputs([str(folder)]).images, writer, done)
    found = {path.name.removesuffix(LABELS): np.asarray(Image.open(path)) for path in out.glob(f"*{LABELS}")}
    return found, errors


def test_batches_overlap_where_the_backend_can(model, pictures):
    backend = Overlapping(load_backend(model, "onnxruntime"))
    found, errors = segmented(backend, pictures)
    assert backend.events == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"]
    assert not errors
    for index, size in enumerate([(40, 70), (70, 40), (40, 70)]):
        assert (found[f"p{index}"] == picture(*size)[1]).mean() > 0.9


@pytest.mark.parametrize(
    "failures", [{"fail_to_start": {1, 2}}, {"fail_to_answer": {1, 3}}], ids=["starting", "answering"]
)
def test_a_picture_that_the_network_refuses_takes_no_other_with_it(model, pictures, failures):
    """Batch 1 is the second picture: it fails beside another one, and again when it runs alone (batch 2 or 3)."""
    backend = Overlapping(load_backend(model, "onnxruntime"), **failures)
    found, errors = segmented(backend, pictures)
    assert sorted(found) == ["p0", "p2"]
    assert list(errors) == ["p1"]
    assert (found["p2"] == picture(40, 70)[1]).mean() > 0.9


def test_images_that_are_done_can_be_left_out(run, model, pictures, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "p1.labels.png").write_bytes(b"done already")
    code, text, _ = run("segment", model, pictures, "-o", out, "--skip-existing")
    assert (code, text.splitlines()[0]) == (0, f"segmented 2 of 2 images into {out}, 1 was there already")
    assert (out / "p1.labels.png").read_bytes() == b"done already"
    code, text, _ = run("segment", model, pictures, "-o", out)
    assert (code, text.splitlines()[0]) == (0, f"segmented 3 of 3 images into {out}")
    assert (out / "p1.labels.png").read_bytes() != b"done already"


def test_images_that_lack_a_file_that_is_asked_for_are_done_again(run, model, pictures, tmp_path):
    out = tmp_path / "out"
    assert run("segment", model, pictures, "-o", out)[0] == 0
    assert run("segment", model, pictures / "p1.png", "-o", out, "--overlay", "--json")[0] == 0
    for options, already in (((), 3), (("--overlay", "--json"), 1), (("--overlay", "--overlay-format", "jpeg"), 0)):
        code, text, _ = run("segment", model, pictures, "-o", out, "--skip-existing", *options)
        done = 3 - already
        assert (code, text.splitlines()[0].partition(" into ")[0]) == (0, f"segmented {done} of {done} images")
    endings = ("json", "labels.png", "overlay.jpg", "overlay.png")
    assert names(out) == sorted(f"p{index}.{ending}" for index in range(3) for ending in endings)


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("overlay_format", ["png", "jpeg"])
def test_the_endings_of_results_are_those_of_their_files(model, overlay, as_json, overlay_format):
    options = ResultOptions(overlay=overlay, as_json=as_json, overlay_format=overlay_format)
    result = Segmenter.load(model, "onnxruntime")(picture(40, 40)[0])
    assert tuple(result.encode(options, {})) == options.endings


def test_a_file_here_and_one_of_its_name_elsewhere(run, model, pictures, tmp_path, monkeypatch):
    """The folder of "p0.png" is the current one, whose name tells the results apart."""
    (pictures / "sub").mkdir()
    Image.fromarray(picture(40, 40)[0]).save(pictures / "sub" / "p0.png")
    monkeypatch.chdir(pictures)
    assert run("segment", model, "p0.png", "sub/p0.png", "-o", tmp_path / "out")[0] == 0
    assert names(tmp_path / "out") == ["pictures/p0.labels.png", "sub/p0.labels.png"]


def test_an_empty_standard_input(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    code, _, err = run("segment", model, "-", "-o", tmp_path / "out")
    assert (code, one_error_line(err)) == (1, "error: standard input: nothing came, expected an image file")


def test_failures_are_listed_beside_the_results_until_a_run_has_none(run, model, pictures, tmp_path):
    broken = pictures / "broken.png"
    broken.write_bytes(b"no image")
    assert run("segment", model, pictures, "-o", tmp_path / "out")[0] == 1
    (line,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert failure["source"] == str(broken)
    assert "not an image in a known format" in failure["error"]
    broken.unlink()
    assert run("segment", model, pictures, "-o", tmp_path / "out")[0] == 0
    assert not (tmp_path / "out" / "failures.jsonl").exists()


def test_more_than_256_classes_write_16_bits(run, pictures, tmp_path):
    model = color_model(tmp_path / "m.onnx", classes=tuple(f"c{i}" for i in range(300)))
    assert run("segment", model, pictures / "p0.png", "-o", tmp_path / "out")[0] == 0
    labels = Image.open(tmp_path / "out" / "p0.labels.png")
    assert labels.mode == "I;16"
    assert set(np.unique(np.asarray(labels))) == {0, 1, 2}


def test_subfolders(run, model, pictures, tmp_path):
    (pictures / "deep").mkdir()
    (pictures / "deep" / "p0.png").write_bytes((pictures / "p1.png").read_bytes())
    assert run("segment", model, pictures, "-o", tmp_path / "flat")[0] == 0
    assert len(names(tmp_path / "flat")) == 3
    assert run("segment", model, pictures, "-o", tmp_path / "tree", "--recursive")[0] == 0
    assert "deep/p0.labels.png" in names(tmp_path / "tree")
    assert len(names(tmp_path / "tree")) == 4


def test_results_in_the_input_folder_are_not_segmented_again(run, model, pictures):
    for _ in range(2):
        code, said, _ = run("segment", model, pictures, "-o", pictures, "--overlay")
        assert code == 0
        assert "3 of 3" in said


def test_two_inputs_of_one_name_are_told_apart_by_their_folders(run, model, pictures, tmp_path):
    Image.fromarray(picture(40, 40)[0]).save(tmp_path / "p0.png")
    assert run("segment", model, pictures, tmp_path / "p0.png", "-o", tmp_path / "out")[0] == 0
    folders = sorted(("pictures/p0.labels.png", f"{tmp_path.name}/p0.labels.png"))
    assert names(tmp_path / "out") == sorted([*folders, "p1.labels.png", "p2.labels.png"])


def test_two_inputs_that_cannot_be_told_apart_are_refused_before_any_work(run, model, pictures, tmp_path):
    other = tmp_path / "other" / "pictures"
    other.mkdir(parents=True)
    Image.fromarray(picture(40, 40)[0]).save(other / "p0.png")
    code, _, err = run("segment", model, pictures, other, "-o", tmp_path / "out")
    assert code == 1
    assert "would both write pictures/p0.png.*" in one_error_line(err)
    assert not (tmp_path / "out").exists()


def test_two_inputs_with_one_stem_keep_their_endings(run, model, pictures, tmp_path):
    Image.fromarray(picture(40, 40)[0]).save(tmp_path / "p0.bmp")
    code, _, err = run("segment", model, pictures, tmp_path / "p0.bmp", "-o", tmp_path / "out")
    assert code == 0
    assert "p0.png -> p0.png.labels.png" in err
    assert names(tmp_path / "out") == [f"{stem}.labels.png" for stem in ("p0.bmp", "p0.png", "p1", "p2")]


def test_label_maps_of_each_kind(run, model, pictures, tmp_path):
    expected = picture(40, 70)[1]
    found = {}
    for kind in ("indexed", "ids", "color"):
        assert run("segment", model, pictures / "p0.png", "-o", tmp_path / kind, "--mask", kind)[0] == 0
        found[kind] = Image.open(tmp_path / kind / "p0.labels.png")
    assert [found[kind].mode for kind in ("indexed", "ids", "color")] == ["P", "L", "RGB"]
    ids = np.asarray(found["ids"])
    assert (ids == expected).mean() > 0.9
    np.testing.assert_array_equal(np.asarray(found["indexed"]), ids)
    colors = np.array(PALETTE, np.uint8)[ids]
    np.testing.assert_array_equal(np.asarray(found["indexed"].convert("RGB")), colors)
    np.testing.assert_array_equal(np.asarray(found["color"]), colors)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "ids" / "p0.labels.png"), cv2.IMREAD_UNCHANGED), ids)


def test_overlays_of_some_classes_with_a_legend(run, model, pictures, tmp_path):
    source = np.asarray(Image.open(pictures / "p0.png"))
    options = ("--overlay", "--json", "--classes", "green,2", "--alpha", "1", "--overlay-format", "jpeg", "--legend")
    assert run("segment", model, pictures / "p0.png", "-o", tmp_path / "out", *options)[0] == 0
    assert names(tmp_path / "out") == ["p0.json", "p0.labels.png", "p0.overlay.jpg"]
    listed = json.loads((tmp_path / "out" / "p0.json").read_text())["classes"]
    assert {entry["class"] for entry in listed} == {"green", "blue"}
    overlay = np.asarray(Image.open(tmp_path / "out" / "p0.overlay.jpg")).astype(int)
    assert overlay.shape[1] > source.shape[1]  # the legend
    assert np.abs(overlay[20, 4] - source[20, 4]).max() < 40  # red is not among the classes
    assert np.abs(overlay[20, 35] - np.array(PALETTE[1])).max() < 40
    code, _, err = run("segment", model, pictures, "-o", tmp_path / "out", "--classes", "roof")
    assert code == 1
    assert "the model has no class 'roof'; it has red, green, blue" in one_error_line(err)


def test_the_summary_after_a_run(run, model, pictures, tmp_path):
    code, text, _ = run("segment", model, pictures, "-o", tmp_path / "out")
    lines = text.splitlines()
    assert (code, lines[0]) == (0, f"segmented 3 of 3 images into {tmp_path / 'out'}")
    assert re.fullmatch(r"[\d.]+ s, [\d.]+ images per second", lines[1])
    assert {line.split()[0] for line in lines[2:]} == {"red", "green", "blue"}
    assert sum(float(line.split()[1].rstrip("%")) for line in lines[2:]) == pytest.approx(100, abs=0.2)
    assert run("segment", model, pictures, "-o", tmp_path / "out", "--quiet")[1] == ""


def test_paths_are_checked_before_the_model_is_loaded(run, pictures, tmp_path):
    (tmp_path / "file").touch()
    for inputs, output, message in (
        ((tmp_path / "gone.png",), tmp_path / "out", "gone.png: no such file"),
        ((pictures,), tmp_path / "file", "is a file, expected a folder"),
    ):
        code, _, err = run("segment", tmp_path / "no-model.onnx", *inputs, "-o", output)
        assert code == 1
        assert message in one_error_line(err)


def test_a_file_named_twice_is_done_once(run, model, pictures, tmp_path):
    code, said, _ = run("segment", model, pictures, pictures / "p0.png", "-o", tmp_path / "out")
    assert code == 0
    assert "3 of 3" in said


def test_bad_pictures_among_good_ones(run, model, pictures, tmp_path):
    data = (pictures / "p0.png").read_bytes()
    (pictures / "cut.png").write_bytes(data[: len(data) // 2])
    (pictures / "text.jpg").write_text("hello")
    out = tmp_path / "out"
    code, said, err = run("segment", model, pictures, tmp_path / "gone.png", "-o", out, "--batch", "2")
    assert code == 1
    assert "segmented 3 of 6 images" in said
    assert names(out) == ["failures.jsonl", "p0.labels.png", "p1.labels.png", "p2.labels.png"]
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 3
    for name in ("cut.png", "text.jpg", "gone.png"):
        assert sum(name in line for line in failed) == 1
    assert "3 of 6 images could not be segmented" in one_error_line(err)


def test_a_single_bad_picture_is_one_line(run, model, tmp_path):
    (tmp_path / "x.jpg").write_text("hello")
    code, _, err = run("segment", model, tmp_path / "x.jpg", "-o", tmp_path / "out")
    assert code == 1
    assert "x.jpg: not an image" in one_error_line(err)
    assert len(err.splitlines()) == 1


def test_the_pixel_limit(run, model, pictures, tmp_path):
    code, _, err = run("segment", model, pictures / "p0.png", "-o", tmp_path / "out", "--max-pixels", "2799")
    assert code == 1
    assert "2,800 pixels, the limit is 2,799; raise it with --max-pixels" in one_error_line(err)
    assert run("segment", model, pictures / "p0.png", "-o", tmp_path / "out", "--max-pixels", "2800")[0] == 0


def test_an_empty_folder(run, model, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run("segment", model, tmp_path / "empty", "-o", tmp_path / "out")
    assert code == 1
    assert "no image here" in one_error_line(err)


def break_missing(path):
    path.unlink()


def break_empty(path):
    path.write_bytes(b"")


def break_truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def break_text(path):
    path.write_text("this is not a model")


def break_no_card(path):
    color_model(path, with_card=False)


def break_newer_card(path):
    model = onnx.load(path)
    model.metadata_props[0].value = model.metadata_props[0].value.replace('"version": 1', '"version": 99')
    onnx.save(model, path)


def break_card(path):
    model = onnx.load(path)
    model.metadata_props[0].value = '{"version": 1, "classes": []}'
    onnx.save(model, path)


def break_data_missing(path):
    color_model(path, external=True)
    path.with_name(f"{path.name}.data").unlink()


def break_data_short(path):
    color_model(path, external=True)
    path.with_name(f"{path.name}.data").write_bytes(b"abc")


def break_names(path):
    model = onnx.load(path)
    model.graph.input[0].name = "picture"
    model.graph.node[0].input[0] = "picture"
    onnx.save(model, path)


def break_operator(path):
    model = onnx.load(path)
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, "no such file"),
        (break_empty, "not an ONNX file, or a truncated one"),
        (break_truncated, "not an ONNX file, or a truncated one"),
        (break_text, "not an ONNX file, or a truncated one"),
        (break_no_card, "without a model card, so not one of export-onnx"),
        (break_newer_card, "card version 99, this program reads version 1"),
        (break_card, "broken model card"),
        (break_data_missing, "its weights are in model.onnx.data, which is not beside it"),
        (break_data_short, "the file is truncated"),
        (break_names, "its model card says"),
        (break_operator, "ONNX Runtime cannot load this model"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
@pytest.mark.parametrize("command", ["segment", "verify"])
def test_broken_models_give_one_line(run, model, pictures, tmp_path, damage, message, command):
    damage(model)
    out = ("-o", tmp_path / "out") if command == "segment" else ()
    code, _, err = run(command, model, *((pictures,) if command == "segment" else ()), *out)
    assert code == 1
    line = one_error_line(err)
    assert "model.onnx" in line
    if not (command == "verify" and damage is break_operator):  # there the checker speaks first
        assert message in line
    assert not (tmp_path / "out").exists()


def test_another_kind_of_file_is_no_model(run, pictures, tmp_path):
    (tmp_path / "model.pth").write_bytes(b"x")
    code, _, err = run("segment", tmp_path / "model.pth", pictures, "-o", tmp_path / "out")
    assert code == 1
    assert "a checkpoint is not run directly; make it an ONNX file first with" in one_error_line(err)


@pytest.mark.parametrize(
    "options",
    [
        ("--resize", "512"),
        ("--resize", "0x512"),
        ("--crop", "512x512"),
        ("--slide", "--stride", "32x32"),
        ("--slide", "--crop", "32x32", "--stride", "64x64"),
        ("--backend", "abacus"),
        ("--batch", "0"),
    ],
    ids=" ".join,
)
def test_wrong_usage(run, model, pictures, tmp_path, options):
    assert run("segment", model, pictures, "-o", tmp_path / "out", *options)[0] == 2
    assert not (tmp_path / "out").exists()


def test_resize_of_a_fixed_model_is_refused(run, pictures, tmp_path):
    model = color_model(tmp_path / "m.onnx", size=(64, 64))
    code, _, err = run("segment", model, pictures, "-o", tmp_path / "out", "--resize", "512x128")
    assert code == 1
    assert "this model takes one size, 64x64" in one_error_line(err)


def test_an_output_folder_that_is_a_file(run, model, pictures, tmp_path):
    (tmp_path / "out").touch()
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        code, _, err = run("segment", model, pictures, "-o", out)
        assert code == 1
        assert "folder" in one_error_line(err)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission denied")],
    ids=["full", "denied"],
)
def test_an_output_folder_that_takes_nothing(run, model, pictures, tmp_path, monkeypatch, number, reason):
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.name.startswith("."):  # a staging folder
            raise OSError(number, os.strerror(number))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, err = run("segment", model, pictures, "-o", tmp_path / "out")
    assert code == 1
    assert reason in one_error_line(err)
    assert names(tmp_path / "out") == []


def test_a_disk_that_fills_up_while_writing_leaves_no_half_file(run, model, pictures, tmp_path):
    """A limit on the size of files makes the kernel refuse in the middle of a write, as a full disk does."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pictures / "p1.png")
    code = (
        "import resource, signal, sys; from internimage_deploy.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "main.run(main.group, sys.argv[1:])"
    )
    arguments = ["segment", model, pictures, "-o", tmp_path / "out", "--overlay"]
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 1
    assert "cannot write" in one_error_line(result.stderr)
    for path in (tmp_path / "out").iterdir():
        assert not path.name.startswith(".")
        Image.open(path).load()


def test_ctrl_c_stops_cleanly(model, pictures, tmp_path):
    for index in range(3000):
        os.link(pictures / "p0.png", pictures / f"q{index}.png")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "internimage_deploy", "segment", model, pictures, "-o", out]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )
    try:
        deadline = time.monotonic() + 300
        while not (out.is_dir() and any(out.iterdir())):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert 0 < len(list(out.iterdir())) < 3003
    for path in out.iterdir():
        assert path.name.endswith(".labels.png")
        assert not path.name.startswith(".")
        Image.open(path).load()
