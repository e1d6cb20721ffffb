# SPDX-License-Identifier: Apache-2.0
"""Both forms of UPerNet's fusion convolutions in engines, and the choice between them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from internimage_deploy.card import EngineInfo
from internimage_deploy.errors import UserError
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.onnx_tools.graph import attribute
from internimage_deploy.runtime.engine import build as build_module
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.build import build, build_engine
from internimage_deploy.runtime.engine.fusion_choice import median_ms, median_ms_on_gpu
from internimage_deploy.runtime.engine.plain_fusion import is_rewritten, make_plain
from internimage_deploy.runtime.engine.prepare import BuildOptions
from internimage_deploy.runtime.engine.protocol import Compiled
from internimage_deploy.runtime.gpu.driver import gpu_problem
from support import golden
from support.engine_models import DYNAMIC_LOGITS, STATIC_LOGITS, exported, graph_of, normal, rtx
from support.tiny_models import color_model

SEGFORMER = ("segformer_l_like", "--size", "64x96")
IMAGE = np.random.default_rng(0)


def plain_graph(model):
    graph = graph_of(exported(*model))
    assert is_rewritten(graph)
    assert make_plain(graph) == 2  # the pyramid pooling's and the pyramid's
    assert not is_rewritten(graph)
    onnx.checker.check_model(graph.model)
    return graph


def logits(model, feed):
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {session.get_inputs()[0].name: feed})[0]


@pytest.mark.parametrize(
    ("model", "feed"),
    [
        (STATIC_LOGITS, normal(1, 3, 64, 96)),
        (DYNAMIC_LOGITS, IMAGE.integers(0, 256, (2, 96, 64, 3), np.uint8)),
        (
            DYNAMIC_LOGITS,
            IMAGE.integers(0, 256, (1, 160, 224, 3), np.uint8),
        ),  # the last map is 5x7
    ],
    ids=["static", "dynamic", "odd maps"],
)
def test_the_plain_form_computes_the_same(model, feed):
    graph = plain_graph(model)
    rewritten = logits(str(exported(*model)), feed)
    plain = logits(graph.model.SerializeToString(), feed)
    assert plain.shape == rewritten.shape
    np.testing.assert_allclose(plain, rewritten, rtol=0, atol=1e-4 * np.abs(rewritten).max())


def head(graph):
    """{operator: count} of what computes features in the two fusion convolutions."""
    places = ("decode_head.bottleneck", "decode_head.fpn_bottleneck")
    nodes = [node for node in graph.nodes if node.name.startswith(places)]
    sizes = ("Shape", "Reshape")  # of numbers; no map is reshaped in the plain form
    maps = [node for node in nodes if node.op_type not in sizes and attribute(node, "axis", 1) == 1]
    return Counter(node.op_type for node in maps)


@pytest.mark.parametrize("model", [STATIC_LOGITS, DYNAMIC_LOGITS], ids=["static", "dynamic"])
def test_the_plain_form_is_that_of_an_export_without_the_rewrites(model):
    without = ("--without", "upernet-fusion", "--without", "pyramid-pooling")
    plain, made = graph_of(exported(*model, *without)), plain_graph(model)
    assert head(made) == head(plain) == {"Resize": 7, "Concat": 2, "Conv": 2, "Relu": 2}
    for place in ("decode_head.bottleneck.conv", "decode_head.fpn_bottleneck.conv"):
        kernels = []
        for graph in (made, plain):
            (conv,) = (node for node in graph.nodes if node.name == f"{place}/Conv")
            kernels.append(graph.array(graph.initializers()[conv.input[1]]))
        np.testing.assert_allclose(kernels[0], kernels[1], rtol=1e-5, atol=1e-7)
    assert "MatMul" not in {node.op_type for node in made.nodes if "others" in node.name}


@pytest.mark.parametrize("head", ["plain export", "SegFormer", "Mask2Former"])
def test_other_heads_are_left_alone(head, exports):
    if head == "Mask2Former":  # with a map that is upsampled in the same way, but no such sum
        size = tuple(golden.case("m2f_h_like")["input"][2:])
        path = exports("m2f_h_like", ExportOptions(size=size, input="float")).path
    else:
        path = exported(*((*STATIC_LOGITS, "--plain") if head == "plain export" else SEGFORMER))
    graph = graph_of(path)
    before = graph.model.SerializeToString()
    assert not is_rewritten(graph)
    assert make_plain(graph) == 0
    assert graph.model.SerializeToString() == before


@pytest.mark.parametrize("fusion", ["plain", "rewritten"])
def test_nvidias_compiler_builds_both_forms(fusion, tmp_path):
    options = BuildOptions(precision="fp16", fusion=fusion, compute_capabilities=("8.6",))
    kept = tmp_path / "kept.onnx"
    built = build(exported(*STATIC_LOGITS), tmp_path / "m.engine", rtx(), options, save_onnx=kept)
    assert sidecar.read(built.path).engine.fusion == fusion
    assert built.notes == ()
    found, feed = logits(str(kept), normal(1, 3, 64, 96)), normal(1, 3, 64, 96)
    expected = logits(str(exported(*STATIC_LOGITS)), feed)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_a_model_without_them(tmp_path):
    model = color_model(tmp_path / "m.onnx")
    options = {"max": ((1, 64, 64),), "compute_capabilities": ("8.6",)}
    built = build(model, tmp_path / "m.engine", rtx(), BuildOptions(fusion="plain", **options))
    assert built.card.engine.fusion == ""
    assert [note for note in built.notes if "fusion" in note] == [
        "the model has no rewritten fusion convolutions, so --fusion has no effect"
    ]
    built = build(model, tmp_path / "m.engine", rtx(), BuildOptions(**options))
    assert [note for note in built.notes if "fusion" in note] == []


@pytest.fixture
def auto(monkeypatch, tmp_path):
    """Build with --fusion auto where an engine takes as long as a test says; the engines are not real."""

    def compile_in_process(job, on_event):
        content = f"engine {len(auto.compiled)}".encode()
        auto.compiled.append(job)
        Path(job.output).write_bytes(content)
        return Compiled("1.7.1", "", len(content))

    def auto(measure):
        kept = tmp_path / "kept.onnx"
        model = exported(*STATIC_LOGITS)
        built = build(model, tmp_path / "m.engine", rtx(), BuildOptions(), measure=measure, save_onnx=kept)
        assert {path.name for path in tmp_path.iterdir() if path.suffix != ".data"} == {
            *("m.engine", "m.engine.json", "kept.onnx")
        }
        return built, is_rewritten(graph_of(kept))

    auto.compiled = []
    monkeypatch.setattr(build_module, "compile_in_process", compile_in_process)
    return auto


@pytest.mark.skipif(gpu_problem() == "", reason="asks what happens without a GPU")
def test_without_a_gpu_nothing_is_timed(tmp_path):
    with pytest.raises(UserError, match="NVIDIA driver"):
        median_ms_on_gpu(tmp_path / "no.engine", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ({"rewritten": [2.0, 1.5], "plain": [1.6, 1.7]}, "rewritten"),
        ({"rewritten": [2.0, 1.5], "plain": [1.6, 1.25]}, "plain"),
        ({"rewritten": [1.0, 1.0], "plain": [1.0, 1.0]}, "rewritten"),
    ],
    ids=["rewritten", "plain", "equal"],
)
def test_auto_keeps_the_faster_form(auto, times, kept):
    timed = []

    def measure(engine):
        form = sidecar.read(engine).engine.fusion  # the engine can be loaded where it lies
        timed.append(form)
        return times[form][timed.count(form) - 1]

    built, rewritten = auto(measure)
    assert timed == ["rewritten", "plain"] * 2
    info = sidecar.read(built.path).engine
    assert info.fusion == kept
    assert info.fusion_ms == {form: min(found) for form, found in times.items()}
    assert rewritten == (kept == "rewritten")
    assert built.path.read_bytes() == {"rewritten": b"engine 0", "plain": b"engine 1"}[kept]
    shown = ", ".join(f"{form} {min(found):.3f} ms" for form, found in times.items())
    assert built.notes[-1] == f"--fusion auto kept the {kept} form: {shown}"


def test_auto_without_a_gpu(auto):
    built, rewritten = auto(None)
    assert (built.card.engine.fusion, built.card.engine.fusion_ms, rewritten) == ("rewritten", {}, True)
    assert built.notes[-1] == "--fusion auto kept the rewritten form, because no engine can be timed here"
    assert len(auto.compiled) == 1


def test_auto_where_an_engine_cannot_be_timed(auto):
    def measure(engine):
        raise UserError("not enough memory")

    built, rewritten = auto(measure)
    assert (built.card.engine.fusion, built.card.engine.fusion_ms, rewritten) == ("rewritten", {}, True)
    assert "because engines could not be timed (not enough memory)" in built.notes[-1]
    assert len(auto.compiled) == 1  # the other form is not built for nothing


def test_auto_where_the_plain_form_cannot_be_built(auto, monkeypatch):
    compile_first = build_module.compile_in_process

    def compile_once(job, on_event):
        if auto.compiled:
            raise UserError("too little workspace")
        return compile_first(job, on_event)

    monkeypatch.setattr(build_module, "compile_in_process", compile_once)
    built, rewritten = auto(lambda engine: 1.0)
    assert (built.card.engine.fusion, built.card.engine.fusion_ms, rewritten) == ("rewritten", {}, True)
    assert built.notes[-1] == (
        "--fusion auto kept the rewritten form, because the plain one cannot be built (too little workspace)"
    )


def test_a_model_is_timed_in_a_process_of_its_own(tmp_path):
    """With ONNX Runtime in the place of a GPU backend, the command and its JSON are real."""
    assert 0 < median_ms(color_model(tmp_path / "m.onnx"), "onnxruntime") < 60_000
    with pytest.raises(UserError, match=r"no.engine: no such file"):
        median_ms(tmp_path / "no.engine", "tensorrt-rtx")


def test_an_unknown_form(tmp_path):
    with pytest.raises(UserError, match="fusion is 'low', expected one of auto, plain, rewritten"):
        build_engine("model.onnx", tmp_path / "model.engine", fusion="low")


def test_the_card_keeps_the_times():
    info = EngineInfo("tensorrt", "10.3.0", "0" * 64, (), fusion="plain", fusion_ms={"plain": 1.25, "rewritten": 2})
    assert json.loads(json.dumps(info.fusion_ms)) == {"plain": 1.25, "rewritten": 2}
