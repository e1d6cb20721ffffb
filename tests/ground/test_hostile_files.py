# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile model files, engine cards and external data: one line each, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from internimage_deploy.card import METADATA_KEY, EngineInfo, ModelCard
from internimage_deploy.cli import info
from internimage_deploy.errors import MissingDependency, UserError, escaped, one_line, quoted
from internimage_deploy.files import kind_of_file
from internimage_deploy.onnx_tools.model_file import external_files, read_card, read_model
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.engine import sidecar
from support.tiny_models import color_model

FUZZ = Path(__file__).parents[1] / "support" / "file_fuzz.py"
COUNT = int(os.environ.get("INTERNIMAGE_FUZZ_FILES", "1250"))


@pytest.fixture
def model(tmp_path):
    return color_model(tmp_path / "m.onnx")


def edited(path, change):
    """The model in `path`, changed by a function, or its card's JSON fields by a dict."""
    proto = onnx.load(path, load_external_data=False)
    if isinstance(change, dict | str):
        (entry,) = [entry for entry in proto.metadata_props if entry.key == METADATA_KEY]
        entry.value = change if isinstance(change, str) else json.dumps(json.loads(entry.value) | change)
    else:
        change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[" * 100_000, "not a model card"),
        ('{"version": "' + "9" * 100_000 + '"}', "card version 9{40,80}... "),
        ({"version": True}, "card version True"),
        ({"architecture": "a\x1b[2J"}, r"architecture: got a\\x1b\[2J, expected a text"),
        ({"architecture": "\ud800"}, r"architecture: got \\ud800"),
        ({"classes": []}, "classes: got .*, expected a list of 1 to 65,536"),
        ({"classes": ["a", 1, "c"]}, "classes: got 1, expected a text"),
        ({"palette": [[1e999, 0, 0]] * 3}, "palette: got inf, expected an integer from 0 to 255"),
        ({"palette": [[0, 0, 256]] * 3}, "palette: got 256"),
        ({"size_divisor": 0}, "size_divisor: got 0, expected an integer from 1 to 1,024"),
        ({"size_divisor": [32]}, "size_divisor: got"),
        ({"size_divisor": True}, "size_divisor: got True"),
        ({"resize": ["x", 2]}, "resize: got x"),
        ({"resize": [-1, 5]}, "resize: got -1"),
        ({"resize": [10**9, 5]}, "resize: got 1000000000, expected an integer from 1 to 16,384"),
        ({"mean": [1, 2, float("nan")]}, "mean: got nan"),
        ({"std": [1, 0, 1]}, "std: got 0"),
        ({"precision": "fp8"}, "precision: got fp8, expected one of fp32, fp16, bf16"),
        ({"input": {"name": "image", "dtype": "uint8", "shape": ["n"]}}, "input: shape: got"),
        ({"input": {"name": "image", "dtype": "uint8", "shape": ["n", 3, "h", "w"]}}, r"expected \(N, H, W, 3\)"),
        ({"input": {"name": "image", "dtype": "object", "shape": ["n", "h", "w", 3]}}, "input: dtype: got object"),
        ({"input": []}, "input: got .*, expected an object"),
        ({"output": {"name": "labels", "dtype": "float32", "shape": ["n", "h", "w"]}}, "expected integers"),
        ({"engine": {"flavour": []}}, "engine: 'version' is missing"),
        ({"engine": 5}, "engine: got 5, expected an object"),
        ({"model": {"a": {"b": {"c": 1}}}}, "model: got"),
        ({"tools": {"torch": 2}}, "tools: got 2"),
        ({"x\x1b" * 1000: 1}, r"'x\\x1bx.*' is no field"),
    ],
)
def test_broken_cards(change, message, model):
    with pytest.raises(UserError, match=message) as error:
        read_card(edited(model, change))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flavour": "x\x1b"}, r"flavour: got x\\x1b, expected one of tensorrt, tensorrt-rtx"),
        ({"flavour": []}, "flavour: got"),
        ({"version": 1.5}, "version: got 1.5, expected a version"),
        ({"version": "²"}, "version: got ²"),
        ({"version": "9" * 100_000}, r"version: got 9+\.\.\. \(100,000 characters\)"),
        ({"profiles": {"min": 1}}, "profiles: got"),
        ({"profiles": [5]}, "profiles: got 5"),
        ({"profiles": [{"min": [1, 1, 1]}]}, "profiles: 'opt' is missing"),
        ({"profiles": [{"min": [2, 2, 2], "opt": [1, 1, 1], "max": [3, 3, 3]}]}, "in this order"),
        ({"compute_capabilities": "8.6"}, "compute_capabilities: got 8.6, expected a list"),
        ({"plugin_embedded": "no"}, "plugin_embedded: got no, expected true or false"),
        ({"surprise": 1}, "'surprise' is no field"),
    ],
)
def test_broken_engine_cards(change, message, model):
    engine = model.with_name("m.engine")
    engine.write_bytes(b"engine")
    fields = json.loads(read_card(model).to_json())
    built = {"flavour": "tensorrt", "version": "10.14.1", "sha256": "ab", "compute_capabilities": ["8.6"]}
    sidecar.path_of(engine).write_text(json.dumps(fields | {"engine": built | change}))
    for read in (sidecar.read, sidecar.info_of, load_backend, info.collect):
        with pytest.raises(UserError, match=message) as error:
            read(engine)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 600


def test_cards_of_every_version_of_a_compiler(model):
    for version in ("10.14.1", "10.14.1.48", "1.4.0.76", "8.6.2", "11.0", "10.0.1b6", "10.3.0.post1", "1.2.0+cu12"):
        shared = version.startswith(("10.", "11."))
        built = EngineInfo("tensorrt", version, "ab", (), profile_sharing=shared, tf32=True)
        card = ModelCard.from_json(json.dumps(json.loads(read_card(model).to_json()) | {
            "engine": {"flavour": "tensorrt", "version": version, "sha256": "ab", "compute_capabilities": []}
        }))  # fmt: skip
        assert card.engine == built


def external(key, value):
    def change(proto):
        tensor = proto.graph.initializer[0]
        del tensor.external_data[:]
        entries = {"location": "m.onnx.data", "offset": "0", "length": "12"} | {key: value}
        for name, text in entries.items():
            if text is not None:
                tensor.external_data.add(key=name, value=text)

    return change


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", None, "is to lie in ''"),
        ("location", "", "is to lie in ''"),
        ("location", "x" * 5000, r"is to lie in 'x+\.\.\. \(5,000 characters\)'"),
        ("location", "/etc/passwd", "is to lie in '/etc/passwd'"),
        ("location", "../other", "is to lie in '../other'"),
        ("location", "a/../../b", "expected a file in the model's folder"),
        ("location", "C:\\x", "expected a file in the model's folder"),
        ("location", "\x1b[2J", r"is to lie in '\\x1b\[2J'"),
        ("location", "none.data", "its weights are in none.data, which is not beside it"),
        ("location", "é" * 200, "expected a file in the model's folder"),
        ("offset", "x", "has the offset 'x' in m.onnx.data, expected a number of bytes"),
        ("offset", "-1", "has the offset '-1'"),
        ("offset", "²", "has the offset '²'"),
        ("length", "9" * 5000, "has the length '9"),
        ("length", "999999", "expected at least 999,999"),
        ("surprise", "1", "expected a file in the model's folder"),
    ],
)
def test_broken_external_data(key, value, message, tmp_path):
    path = edited(color_model(tmp_path / "m.onnx", external=True), external(key, value))
    with pytest.raises(UserError, match=message) as error:
        read_model(path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()


def test_sound_external_data(tmp_path):
    path = color_model(tmp_path / "m.onnx", external=True)
    assert list(external_files(read_model(path))) == ["m.onnx.data"]


@pytest.mark.parametrize("shape", [(64, 96), (None, 96), (1, 1)])
def test_a_size_that_differs_from_the_card_is_found_at_load(shape, model):
    def fix(proto):
        for dim, side in zip(proto.graph.input[0].type.tensor_type.shape.dim[1:3], shape, strict=True):
            if side:
                dim.dim_value = side

    edited(model, fix)
    for backend in ("onnxruntime", "auto"):
        with pytest.raises(
            UserError, match=r"input 'image' is \[None, .* in the graph, its model card says \[None, None"
        ):
            load_backend(model, backend)
    with pytest.raises(UserError, match="its model card says"):
        info.collect(model)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda node: node.ClearField("attribute"), id="no attributes"),
        pytest.param(lambda node: node.ClearField("input"), id="no inputs"),
        pytest.param(lambda node: node.ClearField("output"), id="no output"),
        pytest.param(lambda node: node.attribute.append(helper.make_attribute("pads", 1)), id="type"),
        pytest.param(lambda node: node.attribute.append(onnx.AttributeProto(name="axis", type=0)), id="no type"),
    ],
)
@pytest.mark.parametrize("operator", ["Conv", "AveragePool", "ArgMax", "Resize", "Cast"])
def test_damaged_nodes(operator, damage, tmp_path):
    path = color_model(tmp_path / "m.onnx", labels=True)
    edited(path, lambda proto: [damage(node) for node in proto.graph.node if node.op_type == operator])
    info.collect(path)
    try:
        load_backend(path, "onnxruntime").run(np.zeros((1, 64, 64, 3), np.uint8))
    except UserError as error:
        assert str(error).isprintable()  # noqa: PT017


def with_functions(path, count, calls):
    """The model with functions f0, f1, ..., of which each calls those that `calls` returns for its number."""
    proto = onnx.load(path)
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("x", 1)]
    for number in range(count):
        names = ["a", *(f"b{step}" for step in range(len(calls(number)) - 1)), "c"]
        steps = zip(calls(number), names, names[1:], strict=False)
        nodes = [helper.make_node(called, [left], [right], domain="x") for called, left, right in steps]
        nodes = nodes or [helper.make_node("Identity", ["a"], ["c"])]
        proto.functions.append(helper.make_function("x", f"f{number}", ["a"], ["c"], nodes, versions))
    proto.opset_import.append(helper.make_opsetid("x", 1))
    output = proto.graph.node[-1].output[0]
    proto.graph.node[-1].output[0] = "before"
    proto.graph.node.append(helper.make_node("f0", ["before"], [output], domain="x"))
    path.write_bytes(proto.SerializeToString())
    return path


def test_functions_that_multiply_are_rejected(model):
    """ONNX Runtime replaces calls when it loads a file, and does not end with one such as this, of a few kilobytes."""
    tripled = with_functions(model, 14, lambda number: [f"f{number + 1}"] * 3 if number < 13 else [])
    with pytest.raises(UserError, match=r"it has 1,594,32[0-9] nodes with its functions .* export the model again$"):
        read_model(tripled)


def test_functions_that_call_themselves_are_rejected(model):
    with pytest.raises(UserError, match=r"call themselves; export the model again$"):
        read_model(with_functions(model, 2, lambda number: [f"f{1 - number}"]))


def test_functions_that_call_functions_are_read(model):
    nested = with_functions(model, 8, lambda number: [f"f{number + 1}"] * 2 if number < 7 else [])
    image = np.zeros((1, 32, 32, 3), np.uint8)
    assert load_backend(nested, "onnxruntime").run(image).shape == (1, 3, 8, 8)


def test_values_in_messages():
    assert quoted("a\x1b[2J\n") == r"a\x1b[2J\n"
    assert quoted("\u202eabc\ud800") == r"\u202eabc\ud800"
    assert quoted("x" * 1000) == "x" * 60 + "... (1,000 characters)"
    assert quoted(10**5000) == "a number of 16,610 bits"
    nested = [1]
    for _ in range(100):
        nested = [nested, nested]
    assert len(quoted(nested)) < 100
    assert one_line(ValueError("a\x1b[2J" + "b" * 1000)).startswith(r"a\x1b[2Jbbb")
    assert len(one_line(ValueError("b" * 1000))) < 420
    assert escaped("a\tb\n", keep="\n") == "a\\tb\n"
    assert str(UserError("a\x1b\nb")) == "a\\x1b\nb"
    assert str(MissingDependency("torch", "export", "exporting")).endswith(
        "run  pip install 'internimage-deploy[export]'"
    )


def test_kinds_of_files():
    assert kind_of_file(b"ftrt" + bytes(20)) == "a TensorRT engine"
    assert kind_of_file(b"PK\3\4") == "a zip archive"
    assert kind_of_file("schön".encode()) == "a text"


def test_damaged_files_are_told_in_one_line(tmp_path):
    """INTERNIMAGE_FUZZ_FILES sets how many."""
    done = subprocess.run(
        [sys.executable, FUZZ, tmp_path, str(COUNT), os.environ.get("INTERNIMAGE_FUZZ_SEED", "0")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(FUZZ.parents[2]), str(FUZZ.parents[1])])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failures"] == []
    assert set(report["verdicts"]) == {"done", "refused"}
    assert report["verdicts"]["refused"] > COUNT
    assert report["peak_mb"] < 1500
