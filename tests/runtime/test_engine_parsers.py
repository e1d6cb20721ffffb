# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from onnx import TensorProto, helper

from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import attribute
from internimage_deploy.operators import contract
from internimage_deploy.runtime.engine.compilers import load_module
from internimage_deploy.runtime.engine.lowering import lower
from internimage_deploy.runtime.engine.operators import RTX_OPERATORS, Parser, check, parser_of
from internimage_deploy.runtime.engine.plugin_nodes import rename_official, to_plugin_nodes
from support.engine_models import DYNAMIC, FLOAT, STATIC_LOGITS, compute, exported, graph_of, normal, rtx, single, small

PARSERS = [Parser("tensorrt", version) for version in ((8, 5), (8, 6), (10, 3), (10, 16), (11, 1))]
RTX = Parser("tensorrt-rtx", (1, 7))
MODELS = {
    "dynamic": DYNAMIC,
    "static": STATIC_LOGITS,
    "post-norm": ("upernet_h_like", "--size", "64x96"),
    "segformer": ("segformer_l_like", "--dynamic", "--plain"),
}


@pytest.mark.parametrize("parser", [*PARSERS, RTX], ids=str)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_exported_operator_can_be_read(parser, model):
    graph = graph_of(exported(*model))
    lower(graph, parser)
    if parser.backend == "tensorrt":
        to_plugin_nodes(graph)
    check(graph.model, parser)
    if parser.backend == "tensorrt" and parser.version < (10, 0):
        assert not [node.name for node in graph.nodes if node.op_type == "Shape" and node.attribute]


def test_the_rtx_row_is_what_its_parser_says():
    rtx()
    trt = load_module("tensorrt-rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert [name for name in sorted(RTX_OPERATORS) if not parser.supports_operator(name)] == []


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_decomposed_exactly(approximate):
    graph = single("Gelu", {"x": (FLOAT, [64])}, {"y": (FLOAT, [64])}, approximate=approximate)
    x = normal(64, scale=3)
    lower(graph, RTX)
    assert [node.op_type for node in graph.nodes] == ["Gelu"]
    graph_8 = single("Gelu", {"x": (FLOAT, [64])}, {"y": (FLOAT, [64])}, approximate=approximate)
    assert lower(graph_8, PARSERS[1]) == ("Gelu",)
    assert "Gelu" not in {node.op_type for node in graph_8.nodes}
    exact = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.astype(float)]
    inner = [math.sqrt(2 / math.pi) * (v + 0.044715 * v**3) for v in x.astype(float)]
    expected = exact if approximate == "none" else [v * (1 + math.tanh(t)) / 2 for v, t in zip(x, inner, strict=True)]
    np.testing.assert_allclose(compute(graph_8, x=x), expected, atol=2e-6)


def test_layer_norm_is_decomposed_for_8_5():
    constants = {"weight": normal(32, seed=1), "bias": normal(32, seed=2)}
    what = {"x": (FLOAT, [2, 5, 32])}, {"y": (FLOAT, [2, 5, 32])}
    graph = single("LayerNormalization", *what, opset=17, constants=constants, epsilon=1e-6)
    x = normal(2, 5, 32, scale=4)
    expected = compute(graph, x=x)
    assert lower(graph, PARSERS[0]) == ("LayerNormalization",)
    np.testing.assert_allclose(compute(graph, x=x), expected, atol=2e-6)
    first = single("LayerNormalization", *what, opset=17, constants=constants, axis=1)
    with pytest.raises(UserError, match="node it: only a LayerNormalization over the last axis"):
        lower(first, PARSERS[0])


def test_cast_like_becomes_a_cast():
    graph = single("CastLike", {"x": (FLOAT, [2]), "like": (TensorProto.INT64, [1])}, {"y": (TensorProto.INT64, [2])})
    lower(graph, PARSERS[1])
    assert [(node.op_type, node.attribute[0].i) for node in graph.nodes] == [("Cast", TensorProto.INT64)]


@pytest.mark.parametrize(
    "bounds", [{"start": 1}, {"end": 2}, {"start": 2, "end": 4}, {"start": -2}, {"end": -1}, {}], ids=str
)
def test_a_part_of_a_shape_is_a_slice_of_it_before_10(bounds):
    """onnx-tensorrt up to 9.3 imports every Shape as the whole one, and complains of nothing."""
    what = {"x": (FLOAT, ["n", 3, "h", "w"])}, {"y": (TensorProto.INT64, ["rank"])}
    x = normal(2, 3, 5, 7)
    for version in ((8, 5), (8, 6), (9, 1), (10, 0)):
        graph = single("Shape", *what, opset=17, **bounds)
        expected = compute(graph, x=x)
        old = bool(bounds) and version < (10, 0)
        assert lower(graph, Parser("tensorrt", version)) == (("Shape",) if old else ())
        assert bool([node for node in graph.nodes if node.op_type == "Shape" and node.attribute]) == (
            bool(bounds) and not old
        )
        np.testing.assert_array_equal(compute(graph, x=x), expected)


def test_integer_labels_reach_uint8_through_float():
    """TensorRT casts to uint8 from floating point only."""
    graph = single("Cast", {"x": (TensorProto.INT64, [256])}, {"y": (TensorProto.UINT8, [256])}, to=TensorProto.UINT8)
    lower(graph, PARSERS[2])
    assert [attribute(node, "to") for node in graph.nodes] == [FLOAT, TensorProto.UINT8]
    np.testing.assert_array_equal(compute(graph, x=np.arange(256)), np.arange(256))


def test_newer_operators_are_brought_down_to_opset_17():
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], "mean", keepdims=1),
        helper.make_node("GridSample", ["mean", "grid"], ["y"], "sample", mode="linear"),
    ]
    shapes = {"x": (FLOAT, [1, 3, 4, 4]), "grid": (FLOAT, [1, 2, 2, 2])}, {"y": (FLOAT, [1, 1, 2, 2])}
    graph = small(nodes, *shapes, constants={"axes": np.int64([1])})
    inputs = {"x": normal(1, 3, 4, 4), "grid": normal(1, 2, 2, 2, scale=0.5)}
    expected = compute(graph, **inputs)
    lower(graph, PARSERS[1])
    assert graph.opset == 17
    np.testing.assert_array_equal(compute(graph, **inputs), expected)


def test_an_operator_without_older_form_is_refused():
    graph = single("Mish", {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])})
    with pytest.raises(
        UserError, match=r"node it: TensorRT 8.6 reads operators up to opset 17, and Mish is of opset 18"
    ):
        lower(graph, PARSERS[1])


@pytest.mark.parametrize(
    ("op_type", "domain", "parser", "message"),
    [
        ("Gelu", "", Parser("tensorrt", (8, 6)), r"node it: TensorRT 8.6 cannot read the operator Gelu; TensorRT 10.0"),
        ("Unique", "", RTX, r"node it: TensorRT-RTX 1.7 cannot read the operator Unique; export the model without it"),
        ("Secret", "acme", RTX, r"node it: TensorRT-RTX 1.7 cannot read the operator acme::Secret"),
        (
            "DCNv3",
            "internimage",
            RTX,
            r"node it: DCNv3 has no function in this file and TensorRT-RTX 1.7 takes no plugins",
        ),
    ],
    ids=["too new", "standard", "foreign", "plugin"],
)
def test_unknown_operators_are_refused(op_type, domain, parser, message):
    graph = single(op_type, {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])}, domain=domain)
    with pytest.raises(UserError, match=message):
        check(graph.model, parser)


def test_versions():
    assert parser_of("tensorrt", "8.5.2.2") == Parser("tensorrt", (8, 5))
    assert not parser_of("tensorrt", "8.6.1").strongly_typed
    assert parser_of("tensorrt", "10.3.0").strongly_typed
    with pytest.raises(UserError, match=r"TensorRT 8.4.1 is too old, 8.5 or later"):
        parser_of("tensorrt", "8.4.1")


def test_plugin_nodes_carry_everything_a_parser_reads():
    graph = graph_of(exported(*DYNAMIC))
    to_plugin_nodes(graph)
    nodes = [node for node in graph.nodes if node.op_type == contract.OP_TYPE]
    assert nodes
    assert not graph.model.functions
    for node in nodes:
        assert attribute(node, "plugin_version") == b"1"
        assert attribute(node, "plugin_namespace") == b""
        assert {entry.name for entry in contract.ATTRIBUTES} <= {entry.name for entry in node.attribute}


def test_official_nodes_become_ours():
    shape = FLOAT, [1, 4, 4, 8]
    inputs = {"input": shape, "offset": (FLOAT, [1, 4, 4, 36]), "mask": (FLOAT, [1, 4, 4, 18])}
    numbers = {"group": 2, "group_channels": 4, "im2col_step": 256, "kernel_h": 3, "kernel_w": 3}
    graph = single("TRTDCNv3", inputs, {"y": shape}, domain="mmdeploy", **numbers)
    assert rename_official(graph) == 1
    (node,) = graph.nodes
    assert (node.domain, node.op_type) == ("internimage", "DCNv3")
    assert "im2col_step" not in {entry.name for entry in node.attribute}
    assert {(entry.domain, entry.version) for entry in graph.model.opset_import} == {("", 20), ("internimage", 1)}
    strange = single("TRTDCNv3", inputs, {"y": shape}, domain="mmdeploy", group=2, flavour=1)
    with pytest.raises(UserError, match="unknown attribute 'flavour'"):
        rename_official(strange)
