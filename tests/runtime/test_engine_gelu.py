# SPDX-License-Identifier: Apache-2.0
"""GELU as one node, for parsers that read it."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.onnx_tools.graph import save
from internimage_deploy.runtime.engine.compilers import Compiler, load_module
from internimage_deploy.runtime.engine.gelu import raise_gelu
from internimage_deploy.runtime.engine.layer_precision import float32_nodes, node_of
from internimage_deploy.runtime.engine.precision import convert
from internimage_deploy.runtime.engine.prepare import BuildOptions, prepare
from support import golden
from support.engine_models import DYNAMIC, FLOAT, STATIC_LOGITS, compute, exported, graph_of, normal, rtx, small

MASK2FORMER = ExportOptions(size=tuple(golden.case("m2f_h_like")["input"][2:]), input="float")


def operators(graph):
    return Counter(node.op_type for node in graph.nodes)


@pytest.mark.parametrize("model", ["dynamic", "static", "Mask2Former"])
def test_every_gelu_of_an_export_becomes_one_node(model, exports):
    if model == "Mask2Former":
        path = exports("m2f_h_like", MASK2FORMER).path
    else:
        path = exported(*(DYNAMIC if model == "dynamic" else STATIC_LOGITS))
    graph = graph_of(path)
    before = operators(graph)
    count = raise_gelu(graph)
    after = operators(graph)
    assert count == after["Gelu"] == before["Erf"] > 4
    assert before - after == Counter({"Div": count, "Erf": count, "Add": count, "Mul": 2 * count})
    onnx.checker.check_model(graph.model, full_check=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_labels_are_equal(precision, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), np.uint8)
    labels = []
    for raised in (False, True):
        graph = graph_of(exported(*DYNAMIC))
        if raised:
            assert raise_gelu(graph)
        if precision == "fp16":
            convert(graph, "fp16")
        path = tmp_path / f"{raised}.onnx"
        save(graph, path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        labels.append(session.run(["labels"], {"image": image})[0])
    assert (labels[0] == labels[1]).mean() >= (1 if precision == "fp32" else 0.999)


def chain(*, root=2**0.5, one=1.0, half=0.5, other="x", extra=(), output="y", shape=(8,)):
    n = helper.make_node
    constants = {"root": np.float32(root), "one": np.float32(one), "half": np.float32(half)}
    nodes = [
        n("Div", ["x", "root"], ["a"], "div"),
        n("Erf", ["a"], ["b"], "erf"),
        n("Add", ["one", "b"], ["c"], "add"),
        n("Mul", ["c", other], ["d"], "mul"),
        n("Mul", ["half", "d"], ["y"], "last"),
        *extra,
    ]
    return small(nodes, {"x": (FLOAT, [8]), "z": (FLOAT, [8])}, {output: (FLOAT, shape)}, opset=17, constants=constants)


def test_the_chain_in_another_order():
    x = normal(8, scale=3)
    expected = compute(chain(), x=x, z=x)
    graph = chain()
    assert raise_gelu(graph) == 1
    assert [(node.op_type, node.name) for node in graph.nodes] == [("Gelu", "last")]
    np.testing.assert_allclose(compute(graph, x=x, z=x), expected, atol=1e-6)


def test_a_reduction_gets_its_axes_as_an_input():
    n = helper.make_node
    rest = (
        n("ReduceMax", ["y"], ["m"], "max", axes=[0], keepdims=0),
        n("ReduceMean", ["y"], ["average"], "mean"),
        n("Sub", ["m", "average"], ["r"], "sub"),
    )
    x = normal(8, scale=3)
    expected = compute(chain(extra=rest, output="r", shape=[1]), x=x, z=x)
    graph = chain(extra=rest, output="r", shape=[1])
    assert raise_gelu(graph) == 1
    np.testing.assert_allclose(compute(graph, x=x, z=x), expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"root": 1.4},
        {"one": 2.0},
        {"half": 1.0},
        {"other": "z"},
        {"extra": (helper.make_node("Identity", ["b"], ["e"], "reader"),)},
        {"extra": (helper.make_node("Split", ["x"], ["e", "f"], "split"),)},
        {"extra": (helper.make_node("DFT", ["x"], ["e"], "dft", axis=0),)},
    ],
    ids=["root", "one", "half", "another factor", "a further reader", "Split in opset 20", "DFT in opset 20"],
)
def test_what_is_something_else_stays(changes):
    graph = chain(**changes)
    before = graph.model.SerializeToString()
    assert raise_gelu(graph) == 0
    assert graph.model.SerializeToString() == before


@pytest.mark.parametrize(("version", "read"), [("8.6.1", False), ("9.2.0", False), ("10.0.1", True), ("11.1.0", True)])
def test_parsers_that_do_not_read_it_get_the_chain(version, read):
    graph = prepare(exported(*DYNAMIC), Compiler("tensorrt", version), BuildOptions()).graph
    assert bool(operators(graph)["Gelu"]) == read == (not operators(graph)["Erf"])


def test_nvidias_parser_makes_one_layer_of_it_and_names_layers_after_nodes(tmp_path):
    """The names are what `keep_float32` finds layers by."""
    graph = prepare(exported(*DYNAMIC), rtx(), BuildOptions(precision="fp16")).graph
    path = tmp_path / "m.onnx"
    save(graph, path)
    api = load_module("tensorrt-rtx")
    builder = api.Builder(api.Logger(api.Logger.ERROR))
    network = builder.create_network(0)
    parser = api.OnnxParser(network, api.Logger(api.Logger.ERROR))
    assert parser.parse(path.read_bytes(), str(path))
    known = {node.name for node in graph.nodes}
    layers = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layers.setdefault(node_of(layer.name, known), []).append(layer)
    gelus = [node.name for node in graph.nodes if node.op_type == "Gelu"]
    assert len(gelus) > 4
    assert [[layer.type.name for layer in layers[name]] for name in gelus] == [["ACTIVATION"]] * len(gelus)
    kept = set(float32_nodes(graph))
    assert {"LayerNormalization", "Add"} <= {node.op_type for node in graph.nodes if node.name in kept}
    without = {node.op_type for node in graph.nodes if node.name in kept and node.name not in layers}
    assert without <= {"ConstantOfShape"}  # zeros, which the parser stores
