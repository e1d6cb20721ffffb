# SPDX-License-Identifier: Apache-2.0
"""Engines of Mask2Former models: the float16 graph in ONNX Runtime, and NVIDIA's compiler, which needs no GPU."""

import json
import subprocess
import sys

import onnx
import pytest

from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.onnx_tools.graph import FLOAT, FLOAT16, Graph, element_types, node_name, save
from internimage_deploy.operators import ms_deform_attn
from internimage_deploy.runtime.engine.precision import convert
from support import golden
from support.engine_models import rtx
from support.small_models import run, session

SIZE = tuple(golden.case("m2f_h_like")["input"][2:])
FIXED = ExportOptions(size=SIZE, input="float")
FREE = ExportOptions(input="float", emit="logits")


def half(path, target, precision="fp16"):
    """The graph that is compiled for `path`, as a file for ONNX Runtime."""
    graph = Graph(onnx.load(path), path.parent)
    convert(graph, precision)
    save(graph, target)
    return target


def test_labels_of_the_float16_graph(exports, tmp_path):
    expected = golden.arrays("m2f_h_like")
    labels = run(
        session(half(exports("m2f_h_like", FIXED).path, tmp_path / "half.onnx")), golden.network_input("m2f_h_like")
    )
    # Masks flip where a logit is within float16's rounding of zero, so labels are what counts.
    assert (labels == expected["labels_network_size"]).mean() >= 0.99


def test_scores_of_the_float16_graph_of_free_size(exports, tmp_path):
    expected = golden.arrays("m2f_h_narrow_like")["logits"]
    source = exports("m2f_h_narrow_like", FREE).path
    scores = run(session(half(source, tmp_path / "half.onnx")), golden.network_input("m2f_h_narrow_like"))
    assert (scores.argmax(1) == expected.argmax(1)).mean() >= 0.98


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_masks_and_sampling_locations_stay_in_float32(precision, exports):
    path = exports("m2f_h_like", FIXED).path
    graph = Graph(onnx.load(path), path.parent)
    convert(graph, precision)
    types = element_types(graph)
    compared = [node for node in graph.nodes if node.op_type in ("Less", "GreaterOrEqual")]
    assert len(compared) == 2 * golden.case("m2f_h_like")["head"]["decoder_layers"]
    assert all(types[node.input[0]] == FLOAT for node in compared)
    producers = {name: node for node in graph.nodes for name in node.output}
    for node in compared:  # the mask product that the comparison decides on
        while node.op_type != "MatMul":
            node = producers[node.input[0]]
        assert [types[name] for name in node.input] == [FLOAT, FLOAT], node_name(node)
    attentions = [node for node in graph.nodes if node.op_type == ms_deform_attn.OP_TYPE]
    kinds = [dict(zip(ms_deform_attn.INPUTS, (types[name] for name in node.input), strict=True)) for node in attentions]
    assert all(kind["sampling_locations"] == FLOAT for kind in kinds)
    assert all(kind["value"] == kind["attention_weights"] != FLOAT for kind in kinds)
    if precision == "fp16":
        products = [node for node in graph.nodes if node.op_type == "MatMul" and "ffns" in node_name(node)]
        assert {types[node.output[0]] for node in products} == {FLOAT16}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("size", ["fixed", "free"])
def test_tensorrt_rtx_compiles_it(size, precision, exports, tmp_path):
    rtx()  # skips where it is not installed
    source = exports("m2f_h_like", FIXED if size == "fixed" else FREE).path
    engine = tmp_path / "model.engine"
    shapes = [] if size == "fixed" else ["--min", "1x32x32", "--opt", "1x64x96", "--max", "2x96x160"]
    command = [
        "build-engine",
        source,
        "-o",
        engine,
        "--backend",
        "tensorrt-rtx",
        "--compute-capability",
        "8.6",
        *shapes,
    ]
    command += ["--fp16"] if precision == "fp16" else []
    done = subprocess.run(
        [sys.executable, "-m", "internimage_deploy", *map(str, command)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    card = json.loads(engine.with_name("model.engine.json").read_text())
    assert card["precision"] == precision
    assert card["model"]["head"]["type"] == "Mask2FormerHead"
    assert engine.stat().st_size > 1_000_000
