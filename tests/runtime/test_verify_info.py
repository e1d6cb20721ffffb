# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import logging
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from internimage_deploy import UserError
from internimage_deploy.card import METADATA_KEY, EngineInfo, ModelCard, TensorSpec
from internimage_deploy.files import sha256
from internimage_deploy.onnx_tools.cost import UnknownShape, graph_statistics, multiply_adds
from internimage_deploy.onnx_tools.model_file import read_card, read_model
from internimage_deploy.runtime.backends import load as load_module
from internimage_deploy.runtime.backends.base import check_output
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.backends.registry import REGISTRY, Entry, choose
from internimage_deploy.runtime.engine import sidecar
from support.tiny_models import color_model


def change(path, edit):
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)
    return path


def scale_weights(factor):
    def edit(model):
        for tensor in model.graph.initializer:
            if tensor.name in ("weight", "bias"):
                values = numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return edit


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "logits"])
@pytest.mark.parametrize("size", [None, (64, 96)], ids=["dynamic", "static"])
def test_verify_of_a_sound_model(run, tmp_path, labels, size):
    code, out, err = run("verify", color_model(tmp_path / "m.onnx", labels=labels, size=size))
    assert (code, err) == (0, "")
    assert "follows the ONNX rules" in out
    assert out.count("batch 2") == (1 if size else 3)


def test_verify_against_equivalent_models(run, tmp_path):
    """Normalisation inside or outside the graph, labels or logits: the same model."""
    color_model(tmp_path / "a.onnx")
    code, out, _ = run("verify", tmp_path / "a.onnx", "--against", color_model(tmp_path / "b.onnx", uint8=False))
    assert code == 0
    assert out.count("100.0000% of the labels agree, max error") == 3
    code, out, _ = run("verify", tmp_path / "a.onnx", "--against", color_model(tmp_path / "c.onnx", labels=True))
    assert code == 0
    assert out.count("of the labels agree") == 3
    backends = ("--backend", "onnxruntime", "--against-backend", "onnxruntime")
    code, out, _ = run("verify", tmp_path / "a.onnx", *backends, "--size", "64x32")
    assert code == 0
    assert "64x32: 100.0000% of the labels agree, max error 0" in out


@pytest.mark.parametrize("fixed_first", [True, False])
def test_verify_takes_the_size_that_either_model_is_fixed_to(run, tmp_path, fixed_first):
    files = [color_model(tmp_path / "free.onnx"), color_model(tmp_path / "fixed.onnx", size=(64, 96))]
    first, second = reversed(files) if fixed_first else files
    code, out, err = run("verify", first, "--against", second)
    assert (code, err) == (0, "")
    assert out.count("64x96: 100.0000% of the labels agree") == 1
    assert "64x64" not in out


def test_verify_finds_what_is_wrong_with_the_second_before_it_runs_the_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(load_module, "open_backend", lambda *about, **options: pytest.fail("a model was loaded"))
    model = color_model(tmp_path / "a.onnx", size=(64, 96))
    two = {"classes": ("red", "green"), "palette": ((255, 0, 0), (0, 255, 0))}
    (tmp_path / "text.onnx").write_text("no model")
    for against, message in (
        (tmp_path / "missing.onnx", "missing.onnx: no such file"),
        (tmp_path / "text.onnx", "not an ONNX file"),
        (color_model(tmp_path / "two.onnx", card_changes=two), "the models have 3 and 2 classes"),
        (color_model(tmp_path / "other.onnx", size=(96, 64)), "take no input size in common; compare their labels on"),
        (tmp_path / "b.bin", "b.bin: no backend reads this kind of file"),
    ):
        code, out, err = run("verify", model, "--against", against)
        assert (code, out) == (1, "")
        assert message in err
    code, _, err = run("verify", model, "--images", tmp_path)
    assert code == 2
    assert "--images compares two models" in err


def test_verify_runs_the_second_model_in_the_same_backend(run, tmp_path):
    """As far as that reads its file."""
    model, other = color_model(tmp_path / "a.onnx"), color_model(tmp_path / "b.onnx")
    for backend in ("onnxruntime", "openvino"):
        code, out, _ = run("verify", model, "--against", other, "--backend", backend, "--size", "64x64")
        assert code == 0
        assert f"comparing a.onnx ({backend}) with b.onnx ({backend})" in out
    code, out, err = run("verify", model, "--against", write_engine(tmp_path / "m.engine"), "--backend", "onnxruntime")
    assert code == 1
    assert "batch 2" not in out  # it cannot be loaded, which is found before the first model runs
    assert "'onnxruntime' does not read" not in err


def test_verify_on_images(run, tmp_path):
    """Models of two fixed sizes, which have no random input in common."""
    first = color_model(tmp_path / "a.onnx", size=(64, 96), labels=True)
    second = color_model(tmp_path / "b.onnx", size=(96, 64), labels=True)
    folder = tmp_path / "images"
    folder.mkdir()
    red, noise = np.zeros((40, 50, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    red[..., 0] = 255
    for name, image in (("red.png", red), ("noise.png", noise)):
        Image.fromarray(image).save(folder / name)
    code, out, err = run("verify", first, "--against", second, "--images", folder, "--min-agreement", "0")
    assert (code, err) == (0, "")
    assert "red.png: 100.0000% of the labels agree" in out
    (share,) = re.findall(r"noise.png: ([\d.]+)% of", out)
    overall = (100 * red.size + float(share) * noise.size) / (red.size + noise.size)
    assert float(share) < 100
    (printed,) = re.findall(r"2 images: ([\d.]+)% of", out)
    assert float(printed) == pytest.approx(overall, abs=1e-3)
    assert f"the worst is {folder / 'noise.png'} with {share}%" in out
    code, _, err = run("verify", first, "--against", second, "--images", folder)
    assert code == 1
    assert "disagree at 2 images: " in err
    code, out, _ = run("verify", first, "--against", first, "--images", folder / "noise.png")
    assert code == 0
    assert "64x96: 100.0000%" in out  # random images, too
    assert "1 image: 100.0000% of the labels agree" in out


def test_verify_goes_on_after_an_image_that_cannot_be_read(run, tmp_path):
    model = color_model(tmp_path / "a.onnx", labels=True)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(folder / name)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    code, out, err = run("verify", model, "--against", model, "--images", folder, "--backend", "onnxruntime")
    assert code == 1
    assert "a.png: 100.0000%" in out
    assert "c.png: 100.0000%" in out
    assert "2 images: 100.0000%" in out
    failed, error = err.splitlines()
    assert failed.startswith(f"failed: {folder / 'b.png'}: cannot be read as an image")
    assert error == "error: 1 of 3 images could not be compared; they are named above"
    code, out, err = run("verify", model, "--against", model, "--images", folder / "b.png", "--backend", "onnxruntime")
    assert code == 1
    assert "1 of 1 images could not be compared" in err
    assert "image:" not in out


def test_verify_sees_other_labels_and_other_logits(run, tmp_path):
    sound = color_model(tmp_path / "a.onnx")
    negated = change(color_model(tmp_path / "b.onnx"), scale_weights(-1))
    code, _, err = run("verify", sound, "--against", negated)
    assert code == 1
    assert "a.onnx and b.onnx disagree at 64x64: " in err
    # Scaling keeps every label and moves every logit.
    scaled = change(color_model(tmp_path / "c.onnx"), scale_weights(1.01))
    code, out, err = run("verify", sound, "--against", scaled)
    assert code == 1
    assert "100.0000% of the labels agree" in out
    assert "expected at most" in err
    assert run("verify", sound, "--against", scaled, "--max-error", "1000")[0] == 0


def test_verify_sees_that_card_and_graph_differ(run, tmp_path):
    wrong = TensorSpec("image", "uint8", ("batch", 64, 64, 3))
    path = color_model(tmp_path / "a.onnx", size=(96, 64), card_changes={"input": wrong})
    code, _, err = run("verify", path)
    assert code == 1
    assert "input 'image' is [None, 96, 64, 3] in the graph, its model card says [None, 64, 64, 3]" in err


def test_verify_sees_a_network_that_mixes_up_its_batch(run, tmp_path):
    def average_over_batch(model):
        model.graph.node[-1].output[0] = "own"
        model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axes"))
        model.graph.node.append(helper.make_node("ReduceMean", ["own", "axes"], ["average"]))
        model.graph.node.append(helper.make_node("Sub", ["own", "average"], ["logits"]))

    code, _, err = run("verify", change(color_model(tmp_path / "m.onnx"), average_over_batch))
    assert code == 1
    assert "the network's output for an image differs between a single run and a batch" in err


def test_verify_sees_more_labels_than_classes(run, tmp_path):
    two = {"classes": ("red", "green"), "palette": ((255, 0, 0), (0, 255, 0))}
    code, _, err = run("verify", color_model(tmp_path / "m.onnx", labels=True, card_changes=two))
    assert code == 1
    assert "returned label 2, the card names 2 classes" in err


@pytest.mark.parametrize("size", ["60x64", "64x100"])
def test_sizes_that_are_no_multiple_of_32(run, tmp_path, size):
    for command in ("verify", "info", "benchmark"):
        code, _, err = run(command, color_model(tmp_path / "m.onnx"), "--size", size)
        assert code == 1
        assert "multiples of 32" in err


def test_info(run, tmp_path):
    path = color_model(tmp_path / "m.onnx", external=True)
    code, out, _ = run("info", path, "--json", "--size", "64x96")
    assert code == 0
    report = json.loads(out)
    assert report["card"]["classes"] == ["red", "green", "blue"]
    assert report["graph"]["parameters"] == 3 * 3 + 3 + 3 + 3
    assert report["graph"]["file_bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert report["graph"]["operators"]["Conv"] == 1
    assert report["multiply_adds"] == {"size": [64, 96], "total": 16 * 24 * 9, "by_operator": {"Conv": 16 * 24 * 9}}
    code, out, _ = run("info", path)
    assert code == 0
    assert "image uint8 (batch, height, width, 3)" in out
    assert run("info", color_model(tmp_path / "s.onnx", size=(64, 64)), "--size", "96x96")[0] == 1


def write_engine(path, **changes):
    """A file that stands for an engine, with its card."""
    path.write_bytes(b"engine")
    info = EngineInfo("tensorrt", "10.13.0", sha256(path), (), device="Thing", plugin_version="1", **changes)
    source, output = (
        TensorSpec("image", "uint8", ("batch", 64, 96, 3)),
        TensorSpec("labels", "uint8", ("batch", 64, 96)),
    )
    card = ModelCard("net", ("road", "sky"), ((0, 0, 0),) * 2, source, output, engine=info)
    sidecar.path_of(path).write_text(card.to_json())
    return path


def test_info_of_an_engine_is_its_card(run, tmp_path):
    shapes = {"min": (1, 64, 96), "opt": (2, 64, 96), "max": (4, 64, 96)}
    path = write_engine(tmp_path / "m.engine", profiles=(shapes,), plugin_embedded=True)
    code, out, _ = run("info", path)
    assert code == 0
    for words in ("tensorrt 10.13.0", "Thing", "version 1, inside", "min 1x64x96 opt 2x64x96 max 4x64x96", "road, sky"):
        assert words in out
    report = json.loads(run("info", path, "--json")[1])
    assert (report["file_bytes"], report["card"]["engine"]["sha256"]) == (6, sha256(path))
    code, _, err = run("info", path, "--size", "64x96")
    assert code == 1
    assert "leave --size out" in err
    path.write_bytes(b"another")
    assert "is not the one its card describes" in run("info", path)[2]


def test_info_says_how_an_engine_was_built(run, tmp_path):
    times = {"rewritten": 2.0, "plain": 1.25}
    changes = {"plugin_file": "plugin-0123.so", "tf32": True, "fusion": "plain", "fusion_ms": times}
    _, out, _ = run("info", write_engine(tmp_path / "m.engine", **changes))
    for words in ("version 1, beside it: plugin-0123.so", "may be in TF32", "plain (timed: "):
        assert words in out
    assert "rewritten 2.000 ms" in out
    assert "plain 1.250 ms" in out
    _, out, _ = run("info", write_engine(tmp_path / "m.engine"))
    assert "in a file of its own" in out
    assert "fusion" not in out


def test_benchmark_refuses_a_size_or_batch_that_is_not_the_models(run, tmp_path):
    fixed = color_model(tmp_path / "m.onnx", size=(64, 96), batch=2)
    code, _, err = run("benchmark", fixed, "--batch", "5", "--backend", "onnxruntime")
    assert code == 1
    assert "takes batches of 2 only, got --batch 5" in err
    code, _, err = run("benchmark", fixed, "--size", "96x64", "--backend", "onnxruntime")
    assert code == 1
    assert "the model takes one size, 64x96, got 96x64" in err
    for batch in ((), ("--batch", "2")):
        code, out, _ = run("benchmark", fixed, *batch, "--backend", "onnxruntime", "--runs", "3", "--json")
        assert (code, json.loads(out)["input"]) == (0, [2, 64, 96, 3])


def write_graph(path, nodes, initializers, size=("height", "width")):
    """A model around `nodes` that map "input" to "logits"."""
    source = TensorSpec("input", "float32", ("batch", 3, *size))
    output = TensorSpec("logits", "float32", ("batch", 8, "h4", "w4"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, source.shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, output.shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("internimage", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    card = ModelCard("x", ("a",) * 8, ((0, 0, 0),) * 8, source, output)
    helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    onnx.save(model, path)
    return read_model(path), card


def test_multiply_adds_by_hand(tmp_path):
    """Sizes that the graph computes itself: a matrix (H/4, H/8) made from shapes, as dynamic pooling has."""
    floats = np.float32
    nodes = [
        helper.make_node("Conv", ["input", "stem"], ["low"], strides=[4, 4], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["low", "depthwise"], ["deep"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Shape", ["deep"], ["rows"], start=2, end=3),
        helper.make_node("Div", ["rows", "two"], ["half"]),
        helper.make_node("Concat", ["half", "rows"], ["matrix_shape"], axis=0),
        helper.make_node("ConstantOfShape", ["matrix_shape"], ["matrix"]),
        helper.make_node("MatMul", ["matrix", "deep"], ["halved"]),
        helper.make_node("Transpose", ["halved"], ["nhwc"], perm=[0, 2, 3, 1]),
        helper.make_node("Conv", ["halved", "to_offset"], ["offset_nchw"]),
        helper.make_node("Transpose", ["offset_nchw"], ["offset"], perm=[0, 2, 3, 1]),
        helper.make_node("Conv", ["halved", "to_mask"], ["mask_nchw"]),
        helper.make_node("Transpose", ["mask_nchw"], ["mask"], perm=[0, 2, 3, 1]),
        helper.make_node(
            "DCNv3", ["nhwc", "offset", "mask"], ["moved"], domain="internimage", group=2, group_channels=4
        ),
        helper.make_node("Transpose", ["moved"], ["logits"], perm=[0, 3, 1, 2]),
    ]
    weights = {
        "stem": np.zeros((8, 3, 3, 3), floats),
        "depthwise": np.zeros((8, 1, 3, 3), floats),
        "to_offset": np.zeros((36, 8, 1, 1), floats),
        "to_mask": np.zeros((18, 8, 1, 1), floats),
        "two": np.array([2]),
    }
    model, card = write_graph(tmp_path / "m.onnx", nodes, weights)
    at_64x96 = multiply_adds(model, card, (64, 96), tmp_path)
    low, halved = 16 * 24, 8 * 24
    assert at_64x96 == {
        "Conv": low * 8 * 27 + low * 8 * 9 + halved * 36 * 8 + halved * 18 * 8,
        "MatMul": 8 * (8 * 24) * 16,
        "DCNv3": 5 * halved * 9 * 8,  # as the official repository counts: 5 x positions x points x channels
    }
    in_two = multiply_adds(model, card, (64, 96), tmp_path, batch=2)
    assert in_two == {name: 2 * count for name, count in at_64x96.items()}
    statistics = graph_statistics(model, tmp_path / "m.onnx")
    assert statistics.operators["internimage::DCNv3"] == 1
    assert statistics.nodes == len(nodes)


def test_sizes_that_depend_on_the_data_are_reported(tmp_path):
    nodes = [helper.make_node("NonZero", ["input"], ["found"]), helper.make_node("Cast", ["found"], ["logits"], to=1)]
    model, card = write_graph(tmp_path / "m.onnx", nodes, {})
    with pytest.raises(UnknownShape, match="NonZero"):
        multiply_adds(model, card, (64, 64), tmp_path)


def test_a_backend_that_is_not_installed_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(REGISTRY, "abacus", Entry("abacus:load", (".abc",), "no_such_package", "abacus"))
    with pytest.raises(UserError, match=r"pip install 'internimage-deploy\[abacus\]'"):
        choose(tmp_path / "model.abc")
    with pytest.raises(UserError, match="the backend 'abacus' does not read this kind of file"):
        choose(tmp_path / "model.onnx", "abacus")
    with pytest.raises(UserError, match="no backend 'nothing'; choose one of: auto, onnxruntime"):
        choose(tmp_path / "model.onnx", "nothing")


@pytest.mark.parametrize(
    ("provider", "problem", "backend", "logged"),
    [
        (True, "", "auto", True),
        (False, "", "auto", False),
        (True, "none", "auto", False),
        (True, "", "onnxruntime", False),
    ],
    ids=["idle GPU", "CPU package", "no GPU", "the CPU by name"],
)
def test_a_gpu_that_auto_leaves_idle_is_named(tmp_path, monkeypatch, caplog, provider, problem, backend, logged):
    there = {"onnxruntime", *(("onnxruntime-cuda",) if provider else ())}
    names = {id(entry): name for name, entry in REGISTRY.items()}
    monkeypatch.setattr(load_module, "installed", lambda entry: names[id(entry)] in there)
    monkeypatch.setattr(load_module, "gpu_problem", lambda: problem)
    with caplog.at_level(logging.INFO, "internimage_deploy"):
        load_backend(color_model(tmp_path / "m.onnx"), backend)
    assert ("running on the CPU; --backend onnxruntime-cuda uses the GPU" in caplog.text) == logged


def test_the_output_must_have_the_rank_of_the_card(tmp_path):
    output = TensorSpec("logits", "float32", ("batch", 3, "x", "h4", "w4"))
    path = color_model(tmp_path / "m.onnx", card_changes={"output": output})
    with pytest.raises(
        UserError, match=r"output 'logits' is \[None, 3, None, None\] in the graph, its model card says"
    ):
        load_backend(path, "onnxruntime")
    card = dataclasses.replace(read_card(color_model(tmp_path / "m.onnx")), output=output)
    with pytest.raises(UserError, match="expected 5 dimensions"):
        check_output(np.zeros((1, 3, 16, 16), np.float32), card, 1)
