# SPDX-License-Identifier: Apache-2.0
"""Real builds with TensorRT-RTX, which needs no GPU for them."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from internimage_deploy.card import TensorSpec
from internimage_deploy.cli import main as cli
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.build import build
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.plugin_nodes import to_plugin_nodes
from internimage_deploy.runtime.engine.prepare import BuildOptions, prepare
from internimage_deploy.runtime.engine.process import compile_in_process
from internimage_deploy.runtime.engine.protocol import CompilerChosen, ExpectedTensor, Job, PhaseStarted
from internimage_deploy.runtime.imaging.pipeline import ImagePipeline
from internimage_deploy.window import Window
from support.engine_models import DYNAMIC, STATIC_LOGITS, T, compute, exported, graph_of, normal, official, rtx
from support.tiny_models import color_model
from support.windows import logits_session, with_window


def command(*arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.run(cli.group, ["build-engine", *map(str, arguments)])
    return exit_.value.code or 0


def test_a_static_model_in_float16(tmp_path, capsys):
    source = exported(*STATIC_LOGITS)
    engine = tmp_path / "model.engine"
    kept = tmp_path / "half.onnx"
    options = ("--fp16", "--backend", "tensorrt-rtx", "--compute-capability", "8.6,12.0", "--save-onnx", kept)
    assert command(source, "-o", engine, *options) == 0
    assert f"wrote {engine}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*engine*")) == ["model.engine", "model.engine.json"]
    card = sidecar.read(engine)
    assert (card.precision, card.engine.backend) == ("fp16", "tensorrt-rtx")
    assert card.engine.version == rtx().version
    assert card.engine.compute_capabilities == ("8.6", "12.0")
    assert card.engine.profiles == ()
    assert "LayerNormalization" in card.kept_fp32
    before = json.loads(onnx.load(str(source)).metadata_props[0].value)
    assert (list(card.classes), card.input.shape) == (before["classes"], tuple(before["input"]["shape"]))
    # What was compiled is strongly typed and runs in ONNX Runtime as well.
    import onnxruntime as ort

    session = ort.InferenceSession(str(kept), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].type == "tensor(float)"


def test_a_dynamic_model_with_two_profiles(tmp_path):
    options = BuildOptions(min=((1, 64, 64),) * 2, opt=((1, 64, 96), (1, 96, 64)), max=((2, 64, 128), (2, 128, 64)))
    built = build(exported(*DYNAMIC), tmp_path / "model.engine", rtx(), options)
    # The compiler's network has been compared with them.
    assert built.card.input == TensorSpec("image", "uint8", ("batch", "height", "width", 3))
    assert built.card.output == TensorSpec("labels", "uint8", ("batch", "height", "width"))
    assert [profile["max"] for profile in sidecar.read(built.path).engine.profiles] == [(2, 64, 128), (2, 128, 64)]
    assert built.lowered == ("Cast",)
    assert built.card.precision == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_model_with_a_window_returns_logits_for_its_crops(tmp_path, precision):
    """The compiler's network has been compared with the card; the graph it read runs in ONNX Runtime as well."""
    window = Window((64, 96), (32, 48))
    source = with_window(exported(*DYNAMIC), tmp_path / "m.onnx", window)
    kept = tmp_path / "kept.onnx"
    built = build(source, tmp_path / "m.engine", rtx(), BuildOptions(precision=precision), save_onnx=kept)
    card = sidecar.read(built.path)
    classes = len(card.classes)
    assert card.output == TensorSpec("logits", "float32", ("batch", classes, "height/4", "width/4"))
    assert card.window == window
    assert card.engine.profiles == ({"min": (1, 64, 64), "opt": (1, 64, 96), "max": (1, 64, 96)},)
    assert [note for note in built.notes if "logits" in note] == [
        "the engine returns logits in place of labels, for the sliding window that the model was evaluated with; "
        "--whole compiles it for labels of whole images"
    ]
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)
    (logits,) = onnxruntime.InferenceSession(str(kept)).run(["logits"], {"image": image})
    expected = logits_session(source)(image)
    np.testing.assert_allclose(logits, expected, atol=(0.05 if precision == "fp16" else 1e-4) * np.abs(expected).max())
    pipeline = ImagePipeline(card)
    assert pipeline.window == window
    assert len(pipeline.crops(pipeline.prepare(image[0].repeat(2, 0)))) > 1


def test_a_model_with_a_window_for_whole_images(tmp_path, capsys):
    source = with_window(exported(*DYNAMIC), tmp_path / "m.onnx", Window((64, 96), (32, 48)))
    engine = tmp_path / "m.engine"
    assert command(source, "-o", engine, "--whole", "--max", "1x64x96", "--backend", "tensorrt-rtx") == 0
    card = sidecar.read(engine)
    assert (card.output.name, card.window) == ("labels", None)
    assert "returns logits" not in capsys.readouterr().err
    without = color_model(tmp_path / "x.onnx", labels=True, inner="x", window=Window((64, 64), (32, 32)))
    with pytest.raises(UserError, match=r"sliding window, which averages logits, and the file has none; .* --whole"):
        prepare(without, rtx(), BuildOptions())
    assert prepare(without, rtx(), BuildOptions(whole=True)).card.window is None


def test_bfloat16_and_another_target(tmp_path):
    options = BuildOptions(precision="bf16", compute_capabilities=("8.9",), optimization_level=1, workspace_mib=512)
    built = build(exported(*STATIC_LOGITS), tmp_path / "model.engine", rtx(), options)
    assert built.card.output == TensorSpec("logits", "float32", (1, 19, 16, 24))
    assert built.card.precision == "bf16"


def test_turing_has_no_float32_products(tmp_path):
    """The pooling products, float32 elsewhere, follow the rest; a float32 model is refused beforehand."""
    options = BuildOptions(precision="fp16", compute_capabilities=("7.5",))
    built = build(exported(*STATIC_LOGITS), tmp_path / "model.engine", rtx(), options)
    assert not [name for name in built.card.kept_fp32 if "MatMul" in name]
    with pytest.raises(UserError, match=r"no matrix products in float32 .* 7.5 \(Turing\); use --fp16"):
        build(exported(*STATIC_LOGITS), tmp_path / "no.engine", rtx(), dataclasses.replace(options, precision="fp32"))


@pytest.mark.slow
def test_internimage_t_at_512(tmp_path):
    source = exported(T, "--size", "512x512")
    sizes = {}
    for precision in ("fp16", "fp32"):
        options = BuildOptions(precision=precision, compute_capabilities=("8.6",))
        built = build(source, tmp_path / f"{precision}.engine", rtx(), options)
        sizes[precision] = built.size_bytes
        assert built.card.output == TensorSpec("labels", "uint8", (1, 512, 512))
    assert sizes["fp16"] <= 0.6 * sizes["fp32"]
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak_kib < 6 * 2**20


def test_stopping_a_build_leaves_nothing(tmp_path):
    seen = []

    def stop(event):
        seen.append(event)
        if isinstance(event, PhaseStarted) and event.name != "Parsing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(exported(*STATIC_LOGITS), tmp_path / "model.engine", rtx(), BuildOptions(precision="fp16"), on_event=stop)
    assert seen[:2] == [CompilerChosen(str(rtx())), PhaseStarted("Parsing", None, 1)]
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_on_the_command_line(tmp_path):
    target = tmp_path / "model.engine"
    arguments = ["build-engine", exported(*STATIC_LOGITS), "-o", target, "--fp16", "--backend", "tensorrt-rtx"]
    process = subprocess.Popen(
        [sys.executable, "-m", "internimage_deploy", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip().splitlines()[-1]) == (130, "stopped")
    assert list(tmp_path.iterdir()) == []


def broken(tmp_path):
    """The static model with a classifier for one channel too many."""
    model = onnx.load(str(exported(*STATIC_LOGITS)))
    (conv,) = (node for node in model.graph.node if node.name == "decode_head.conv_seg/Conv")
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == conv.input[1])
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.concatenate([array, array[:, :1]], 1), weight.name))
    path = tmp_path / "broken.onnx"
    onnx.save(model, str(path))
    return path


def test_an_error_names_the_node(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(UserError, match=r"node decode_head.conv_seg/Conv \(Conv\): "):
        build(broken(tmp_path), folder / "model.engine", rtx(), BuildOptions())
    assert list(folder.iterdir()) == []


def test_a_compiler_that_ends_its_process(tmp_path):
    """A plugin node makes TensorRT-RTX abort; `build` never lets one through, so the job is made by hand."""
    graph = graph_of(exported(*STATIC_LOGITS))
    to_plugin_nodes(graph)
    path = tmp_path / "plugin.onnx"
    path.write_bytes(graph.model.SerializeToString())
    source = ExpectedTensor("input", "float32", (1, 3, 64, 96))
    job = Job("tensorrt-rtx", str(path), str(path), str(tmp_path / "x.engine"), source)
    with pytest.raises(UserError, match=r"^(the compiler ended its process \(signal SIG|node )"):
        compile_in_process(job, lambda event: None)
    assert not (tmp_path / "x.engine").exists()


def test_not_a_model(tmp_path, capsys):
    path = tmp_path / "text.onnx"
    path.write_text("no model")
    assert command(path, "-o", tmp_path / "x.engine", "--backend", "tensorrt-rtx") == 1
    assert "text.onnx: not an ONNX file, or a truncated one" in capsys.readouterr().err


def test_without_a_card(tmp_path, capsys):
    model = onnx.load(str(exported(*STATIC_LOGITS)))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "bare.onnx"))
    assert command(tmp_path / "bare.onnx", "-o", tmp_path / "x.engine", "--backend", "tensorrt-rtx") == 1
    assert "without a model card; export the checkpoint with export-onnx, or, " in capsys.readouterr().err


REFUSED = [
    (("--compute-capability", "8.7"), 1, "8.7 is Orin"),
    (("--compute-capability", "9.0"), 1, "9.0 is Hopper"),
    (("--compute-capability", "11.0"), 1, "11.0 is Thor"),
    (("--compute-capability", "5"), 1, "'5' is not a compute capability of TensorRT-RTX, expected some of 7.5, "),
    (("--min", "1x64x64"), 1, "this model takes one size, 1x64x96, so --min, --opt and --max have no effect"),
    (("--version-compatible",), 1, "comes without the lean runtime"),
    (("--embed-plugin",), 1, "TensorRT-RTX takes no plugins, so --embed-plugin has no effect; leave it out"),
    (("--fusion", "low"), 2, "'low' is not one of 'auto', 'plain', 'rewritten'"),
    (("--timing-cache", "x"), 1, "times no kernels while it compiles"),
    (("--keep-fp32", "Relu"), 1, "--keep-fp32 needs --fp16 or --bf16"),
    (("--classes", "ade20k"), 1, "has a model card, so --classes and --size have no effect"),
    (("--opt", "64x64"), 2, "'64x64' is not a size; expected NxHxW"),
    (("--timing-cache", "x", "--no-timing-cache"), 2, "exclude each other"),
    (("--fp16", "--bf16"), 2, "--fp16 and --bf16 exclude each other"),
    (("-o", "model.onnx"), 2, "named like an ONNX file"),
    (("-o", "model.bin"), 2, "expected a name that ends in .engine, .plan, .trt, as model.engine"),
    (("-o", "model"), 2, "model is not named like an engine"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED, ids=[" ".join(entry[0]) for entry in REFUSED])
def test_options_that_cannot_be_had(arguments, code, message, tmp_path, capsys):
    basics = (exported(*STATIC_LOGITS), "--backend", "tensorrt-rtx", "-o", tmp_path / "x.engine")
    assert command(*basics, *arguments) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="asks what happens without a GPU")
def test_without_tensorrt_or_a_gpu(tmp_path, capsys):
    basics = (exported(*STATIC_LOGITS), "-o", tmp_path / "x.engine")
    assert command(*basics, "--backend", "tensorrt") == 1
    assert "TensorRT: not installed; run  pip install 'internimage-deploy[gpu]'" in capsys.readouterr().err


def test_tensorrt_takes_no_targets(tmp_path):
    compiler = Compiler("tensorrt", "10.3.0")
    with pytest.raises(UserError, match=r"TensorRT compiles for the GPU it runs on, so --compute-capability"):
        build(exported(*STATIC_LOGITS), tmp_path / "x", compiler, BuildOptions(compute_capabilities=("8.6",)))
    with pytest.raises(UserError, match=r"TensorRT 8.6 does not know bfloat16; use --fp16"):
        build(exported(*STATIC_LOGITS), tmp_path / "x", Compiler("tensorrt", "8.6.1"), BuildOptions(precision="bf16"))


def test_a_file_of_the_official_exporter(tmp_path, capsys):
    """No card, opset 11, `mmdeploy::TRTDCNv3` and int64 labels (N, 1, H, W)."""
    source = tmp_path / "official.onnx"
    source.write_bytes(official().model.SerializeToString())
    (tmp_path / "names.txt").write_text("road\nbuilding\nsky\ntree\ncar\n")
    engine, kept = tmp_path / "o.engine", tmp_path / "kept.onnx"
    basics = (source, "-o", engine, "--backend", "tensorrt-rtx", "--fp16", "--save-onnx", kept)
    assert command(*basics, "--classes", tmp_path / "names.txt", "--size", "64x64") == 1
    assert "--size 64x64, but this model takes 32x32 only" in capsys.readouterr().err
    assert command(*basics, "--classes", "nobody") == 1
    assert "neither a data set nor a file; expected one of ade20k" in capsys.readouterr().err
    assert command(*basics, "--classes", tmp_path / "names.txt") == 0
    card = sidecar.read(engine)
    assert card.classes == ("road", "building", "sky", "tree", "car")
    assert (card.input.name, card.input.shape) == ("input", (1, 3, 32, 32))
    assert (card.output.name, card.output.dtype, card.output.shape) == ("labels", "uint8", (1, 32, 32))
    # The decomposed normalisation is kept in float32 as the operator is.
    assert {"centre", "positive", "divide"} <= set(card.kept_fp32)
    import onnxruntime as ort

    def labels(path):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return session.run(None, {"input": normal(1, 3, 32, 32)})[0]

    half = labels(kept)
    assert (half.shape, half.dtype) == ((1, 32, 32), np.uint8)
    assert (half == official_labels()).mean() > 0.98


def official_labels():
    """What the official file computes: its nodes as ours, in float32."""
    from internimage_deploy.runtime.engine.official import upgrade_official

    graph = official()
    upgrade_official(graph)
    return compute(graph, input=normal(1, 3, 32, 32))[:, 0]
