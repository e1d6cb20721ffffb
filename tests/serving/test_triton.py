# SPDX-License-Identifier: Apache-2.0
"""`export-triton`, its configuration read by Triton's own protobuf classes."""

import dataclasses
import json
import shlex
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from google.protobuf import text_format

from internimage_deploy.card import EngineInfo
from internimage_deploy.cli.export_triton import export_triton
from internimage_deploy.errors import UserError
from internimage_deploy.files import sha256
from internimage_deploy.onnx_tools.model_file import read_card
from internimage_deploy.runtime.serving.triton import TritonOptions, export
from internimage_deploy.trt_plugins import build
from internimage_deploy.window import Window
from support.tiny_models import color_model, picture

grpc = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="pip install tritonclient grpcio protobuf")


def config(repository, name):
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), grpc.ModelConfig())


@pytest.fixture
def labels_model(tmp_path):
    return color_model(tmp_path / "labels.onnx", size=(64, 96), labels=True)


def engine(tmp_path, card, **info):
    """A stand-in for an engine file with its card; Triton's repository does not look inside."""
    path = tmp_path / "street.engine"
    path.write_bytes(b"engine")
    info = EngineInfo("tensorrt", "10.14", sha256(path), ("8.6",), **info)
    (tmp_path / "street.engine.json").write_text(dataclasses.replace(card, engine=info).to_json())
    return path


def test_an_onnx_model_becomes_a_repository(labels_model, tmp_path):
    repository = tmp_path / "repository"
    commands = export(labels_model, repository, TritonOptions("street", max_batch=16, instances=2, delay_us=700))
    parsed = config(repository, "street")
    assert (parsed.name, parsed.platform, parsed.max_batch_size) == ("street", "onnxruntime_onnx", 16)
    (source,), (output,) = parsed.input, parsed.output
    assert (source.name, source.data_type, list(source.dims)) == ("image", grpc.TYPE_UINT8, [64, 96, 3])
    assert (output.name, output.data_type, list(output.dims)) == ("labels", grpc.TYPE_UINT8, [64, 96])
    assert parsed.instance_group[0].count == 2
    assert parsed.instance_group[0].kind == grpc.ModelInstanceGroup.KIND_AUTO
    assert parsed.dynamic_batching.max_queue_delay_microseconds == 700
    assert list(parsed.dynamic_batching.preferred_batch_size) == [8, 16]
    assert parsed.dynamic_batching.default_queue_policy.max_queue_size == 64
    warm_up = parsed.model_warmup[0]
    assert warm_up.batch_size == 1
    assert list(warm_up.inputs["image"].dims) == [64, 96, 3]
    assert json.loads(parsed.parameters["internimage_deploy"].string_value)["classes"] == ["red", "green", "blue"]
    assert (repository / "street" / "1" / "model.onnx").read_bytes() == labels_model.read_bytes()
    assert f"-v {repository.resolve()}:/models:ro" in commands[0]
    assert "LD_PRELOAD" not in commands[0]


def test_the_copied_model_takes_and_returns_what_the_configuration_says(labels_model, tmp_path):
    export(labels_model, tmp_path / "r", TritonOptions("m"))
    parsed = config(tmp_path / "r", "m")
    session = onnxruntime.InferenceSession(
        tmp_path / "r" / "m" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    warm_up = np.zeros((2, *parsed.model_warmup[0].inputs["image"].dims), np.uint8)
    image, expected = picture(64, 96)
    (output,) = session.run([parsed.output[0].name], {parsed.input[0].name: np.stack([warm_up[0], image])})
    assert output.shape == (2, *parsed.output[0].dims)
    assert output.dtype == np.uint8
    assert (output[1] == expected).mean() > 0.95


def test_a_fixed_batch_is_an_ordinary_dimension(tmp_path):
    model = color_model(tmp_path / "m.onnx", size=(32, 32), batch=2, labels=True)
    export(model, tmp_path / "r", TritonOptions("m"))
    parsed = config(tmp_path / "r", "m")
    assert parsed.max_batch_size == 0
    assert list(parsed.input[0].dims) == [2, 32, 32, 3]
    assert list(parsed.model_warmup[0].inputs["image"].dims) == [2, 32, 32, 3]
    assert not parsed.HasField("dynamic_batching")


def test_free_sizes_and_external_weights(tmp_path):
    model = color_model(tmp_path / "m.onnx", labels=True, external=True)
    export(model, tmp_path / "r", TritonOptions("m"))
    parsed = config(tmp_path / "r", "m")
    assert list(parsed.input[0].dims) == [-1, -1, 3]
    assert list(parsed.model_warmup[0].inputs["image"].dims) == [512, 512, 3]
    copied = tmp_path / "r" / "m" / "1"
    assert sorted(path.name for path in copied.iterdir()) == ["m.onnx.data", "model.onnx"]
    assert (copied / "m.onnx.data").read_bytes() == (tmp_path / "m.onnx.data").read_bytes()


def test_names_and_classes_with_special_characters_survive(tmp_path):
    classes = ('"quoted"', "back\\slash", "Straße\n")
    model = color_model(tmp_path / "m.onnx", size=(32, 32), labels=True, classes=classes)
    export(model, tmp_path / "r", TritonOptions("m"))
    data = json.loads(config(tmp_path / "r", "m").parameters["internimage_deploy"].string_value)
    assert tuple(data["classes"]) == classes


def test_the_start_command_is_one_for_a_shell_whatever_the_folder_is_called(labels_model, tmp_path):
    repository = tmp_path / "Straßen und $HOME"
    start, _ = export(labels_model, repository, TritonOptions("m"))
    words = shlex.split(start)
    assert words[words.index("-v") + 1] == f"{repository}:/models:ro"
    echoed = subprocess.run(
        ["sh", "-c", start.replace("docker", "echo", 1)], capture_output=True, text=True, check=True
    )
    assert f"-v {repository}:/models:ro nvcr.io" in echoed.stdout


def test_an_engine_takes_its_plugin_along(labels_model, tmp_path):
    profile = {"min": (1, 64, 96), "opt": (2, 64, 96), "max": (4, 64, 96)}
    model = engine(tmp_path, read_card(labels_model), plugin_version="1", profiles=(profile,))
    plugin = tmp_path / "libdcnv3.so"
    plugin.write_bytes(b"library")
    (tmp_path / "libinternimage_trt_register.so").write_bytes(b"register")
    commands = export(model, tmp_path / "r", TritonOptions("street", plugin=plugin, device="cpu"))
    parsed = config(tmp_path / "r", "street")
    assert (parsed.platform, parsed.max_batch_size) == ("tensorrt_plan", 4)
    assert parsed.instance_group[0].kind == grpc.ModelInstanceGroup.KIND_GPU
    folder = tmp_path / "r" / "street"
    assert (folder / "1" / "model.plan").read_bytes() == b"engine"
    # The registering library looks for its neighbour of this name.
    assert (folder / "libinternimage_trt_plugins.so").read_bytes() == b"library"
    assert (folder / "libinternimage_trt_register.so").read_bytes() == b"register"
    assert "--backend-config=tensorrt,plugins=/models/street/libinternimage_trt_register.so" in commands[0]
    assert "LD_PRELOAD" not in commands[0]
    assert "--gpus all" in commands[0]
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["street"], "Triton takes every folder for a model"


def test_the_registering_library_comes_from_the_cache_where_it_does_not_lie_beside(labels_model, tmp_path, monkeypatch):
    model = engine(tmp_path, read_card(labels_model), plugin_version="1")
    plugin = tmp_path / "libdcnv3.so"
    plugin.write_bytes(b"library")
    monkeypatch.setattr(build, "cached_libraries", list)
    with pytest.raises(UserError, match=r"libinternimage_trt_register\.so is missing: .* build-plugin"):
        export(model, tmp_path / "r", TritonOptions("street", plugin=plugin))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "libinternimage_trt_register.so").write_bytes(b"register")
    monkeypatch.setattr(build, "cached_libraries", lambda: [tmp_path / "cache" / "libinternimage_trt_plugins.so"])
    export(model, tmp_path / "r", TritonOptions("street", plugin=plugin))
    assert (tmp_path / "r" / "street" / "libinternimage_trt_register.so").read_bytes() == b"register"


def test_the_plugin_library_beside_the_engine_is_taken(labels_model, tmp_path):
    plugin = tmp_path / "libinternimage_trt_plugins.so"
    plugin.write_bytes(b"beside")
    (tmp_path / "libinternimage_trt_register.so").write_bytes(b"register")
    info = {"plugin_version": "1", "plugin_file": plugin.name, "plugin_sha256": sha256(plugin)}
    model = engine(tmp_path, read_card(labels_model), **info)
    export(model, tmp_path / "r", TritonOptions("street"))
    assert (tmp_path / "r" / "street" / plugin.name).read_bytes() == b"beside"
    plugin.write_bytes(b"another")
    with pytest.raises(UserError, match=r"not the plugin library that street\.engine was built with"):
        export(model, tmp_path / "r2", TritonOptions("street"))


@pytest.mark.parametrize("compatible", [False, True])
def test_a_version_compatible_engine_is_allowed_by_name(compatible, labels_model, tmp_path):
    model = engine(tmp_path, read_card(labels_model), version_compatible=compatible)
    start, _ = export(model, tmp_path / "r", TritonOptions("street"))
    assert ("--backend-config=tensorrt,version-compatible=true" in start) == compatible


def test_an_engine_that_is_not_the_cards_is_refused(labels_model, tmp_path):
    model = engine(tmp_path, read_card(labels_model))
    model.write_bytes(b"another")
    with pytest.raises(UserError, match="not the one its card describes"):
        export(model, tmp_path / "r", TritonOptions("street"))
    assert not (tmp_path / "r").exists()


def test_what_triton_cannot_run_is_refused(labels_model, tmp_path):
    card = read_card(labels_model)
    logits = color_model(tmp_path / "logits.onnx")
    with pytest.raises(UserError, match="--input uint8 --emit labels"):
        export(logits, tmp_path / "r", TritonOptions("m"))
    with pytest.raises(UserError, match="needs the plugin library"):
        export(engine(tmp_path, card, plugin_version="1"), tmp_path / "r", TritonOptions("m"))
    missing = TritonOptions("m", plugin=tmp_path / "none.so")
    with pytest.raises(UserError, match="no such file"):
        export(engine(tmp_path, card, plugin_version="1"), tmp_path / "r", missing)
    path = engine(tmp_path, card)
    data = json.loads((tmp_path / "street.engine.json").read_text())
    data["engine"]["flavour"] = "tensorrt-rtx"
    (tmp_path / "street.engine.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="tensorrt-rtx, which Triton does not run"):
        export(path, tmp_path / "r", TritonOptions("m"))
    (tmp_path / "street.engine.json").unlink()
    with pytest.raises(UserError, match=r"its card street\.engine\.json is not beside it"):
        export(path, tmp_path / "r", TritonOptions("m"))
    assert not (tmp_path / "r").exists()


def test_the_command_writes_and_says_how_to_start(labels_model, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "internimage_deploy", "export-triton", labels_model, "-o", tmp_path / "r",
         "--name", "a b"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert config(tmp_path / "r", "a_b").name == "a_b"
    assert "tritonserver --model-repository=/models" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "delay_us", "batch"),
    [
        ([], 5000, 8),
        (["--delay-ms", "0.7", "--batch", "4"], 700, 4),
        (["--delay", "700", "--max-batch", "4"], 700, 4),
    ],
    ids=["defaults", "new names", "names of earlier versions"],
)
def test_delay_and_batch_of_the_command(arguments, delay_us, batch, labels_model, tmp_path):
    command = [str(labels_model), "-o", str(tmp_path / "r"), *arguments]
    CliRunner().invoke(export_triton, command, catch_exceptions=False)
    parsed = config(tmp_path / "r", "labels")
    assert (parsed.dynamic_batching.max_queue_delay_microseconds, parsed.max_batch_size) == (delay_us, batch)


def test_the_old_names_are_not_in_the_help_and_not_mixed_with_the_new(labels_model, tmp_path):
    help_text = CliRunner().invoke(export_triton, ["--help"]).output
    assert "--delay-ms" in help_text
    assert not {"--delay", "--max-batch"} & set(help_text.split())
    both = [str(labels_model), "-o", str(tmp_path / "r"), "--delay", "700", "--delay-ms", "1"]
    result = CliRunner().invoke(export_triton, both)
    assert result.exit_code == 2
    assert "use --delay-ms alone" in result.output


def test_a_model_with_a_window_runs_on_whole_images_with_a_warning(tmp_path, caplog):
    window = Window((64, 64), (32, 32))
    model = color_model(tmp_path / "m.onnx", labels=True, window=window)
    export(model, tmp_path / "repository", TritonOptions("street"))
    assert "on whole images, and" in caplog.text
    assert "was evaluated with a sliding window" in caplog.text
    slides = engine(tmp_path, read_card(color_model(tmp_path / "logits.onnx", window=window)))
    with pytest.raises(UserError, match="must take uint8 images and return labels: build the engine with  --whole"):
        export(slides, tmp_path / "repository", TritonOptions("street"))
