# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn nodes on their way into an engine: as nodes of either plugin, computed by ONNX's reference evaluator."""

import threading

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from internimage_deploy.cli.build_engine import build_engine as command
from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import attribute
from internimage_deploy.operators import contract, ms_deform_attn
from internimage_deploy.runtime.engine.build import build_engine
from internimage_deploy.runtime.engine.compile import compile_engine
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.operators import Parser, check
from internimage_deploy.runtime.engine.plugin_nodes import to_plugin_nodes
from internimage_deploy.runtime.engine.prepare import BuildOptions, prepare
from internimage_deploy.runtime.engine.protocol import ExpectedTensor, Job
from support import fake_tensorrt
from support.engine_models import FLOAT, small
from support.ms_deform_attn_cases import draw, reference
from support.tiny_models import color_model

HALF, BF16, INT32, INT64 = TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT32, TensorProto.INT64
EXPECTED = ExpectedTensor("image", "uint8", (-1, -1, -1, 3))  # of color_model
TENSORRT = Parser("tensorrt", (10, 13))
RTX = Parser("tensorrt-rtx", (1, 7))


class _Plugin(OpRun):
    """What both plugins have in common; NumPy computes it."""

    op_domain = contract.DOMAIN

    def _compute(self, *inputs, plugin_version=None, plugin_namespace=None):
        assert (plugin_version, plugin_namespace) == ("1", "")
        assert [a.dtype.name for a in inputs[1:3]] == ["int32", "int32"]
        return reference(*inputs).astype(inputs[0].dtype)


class MSDeformAttn(_Plugin):
    def _run(self, *inputs, **fields):
        assert inputs[3].dtype == np.float32
        return (self._compute(*inputs, **fields),)


class MultiscaleDeformableAttnPlugin_TRT(_Plugin):
    def _run(self, *inputs, **fields):
        assert inputs[0].dtype == inputs[3].dtype == inputs[4].dtype
        return (self._compute(*inputs, **fields).reshape(*inputs[3].shape[:2], *inputs[0].shape[2:]),)


def graph_of_two(*, value=FLOAT, locations=FLOAT, weights=FLOAT, starts=INT64, function=False):
    """Two nodes on the same levels, the second on what the first returns; the shapes are a constant."""
    operands = draw(0, queries=15, channels=4)
    name = ms_deform_attn.OP_TYPE
    nodes = [
        helper.make_node(name, ["v", "shapes", "starts", "at", "w"], ["a"], "first", domain=contract.DOMAIN),
        helper.make_node("Reshape", ["a", "split"], ["b"], "split"),
        helper.make_node(name, ["b", "shapes", "starts", "at", "w"], ["y"], "second", domain=contract.DOMAIN),
    ]
    kinds = {"v": value, "starts": starts, "at": locations, "w": weights}
    arrays = dict(zip(("v", "shapes", "starts", "at", "w"), operands, strict=True))
    graph = small(
        nodes, {n: (kind, arrays[n].shape) for n, kind in kinds.items()}, {"y": (value, [1, 15, 8])}, opset=17,
        constants={"shapes": operands[1], "split": np.int64([0, 0, 2, 4])}, domains=(contract.DOMAIN,),
    )  # fmt: skip
    if function:
        body = [helper.make_node("Identity", ["value"], ["output"])]
        imports = [helper.make_opsetid("", 17)]
        graph.model.functions.append(
            helper.make_function(contract.DOMAIN, name, ms_deform_attn.INPUTS, ["output"], body, imports)
        )
    return graph, arrays


def compute(graph, arrays):
    onnx.checker.check_model(graph.model)
    evaluator = ReferenceEvaluator(graph.model, new_ops=[MSDeformAttn, MultiscaleDeformableAttnPlugin_TRT])
    return evaluator.run(None, {value.name: arrays[value.name] for value in graph.model.graph.input})[0]


@pytest.mark.parametrize("plugin", ["own", "tensorrt"])
def test_plugin_nodes_compute_the_same(plugin):
    graph, arrays = graph_of_two(function=True)
    operands = list(arrays.values())
    first = reference(*operands)
    expected = reference(first.reshape(1, 15, 2, 4), *operands[1:])
    to_plugin_nodes(graph, plugin)
    assert not graph.model.functions
    check(graph.model, TENSORRT)
    np.testing.assert_allclose(compute(graph, arrays), expected, atol=1e-6)


def test_own_nodes_share_a_cast_for_each_integer_tensor():
    graph, _ = graph_of_two()
    to_plugin_nodes(graph)
    kinds = [node.op_type for node in graph.nodes]
    assert kinds == ["Cast", "Cast", "MSDeformAttn", "Reshape", "MSDeformAttn"]
    first, second = (node for node in graph.nodes if node.op_type == "MSDeformAttn")
    assert first.input[1:3] == second.input[1:3] == ["shapes:int32", "starts:int32"]
    for node in (first, second):
        assert (attribute(node, "plugin_version"), attribute(node, "plugin_namespace")) == (b"1", b"")
    assert {attribute(node, "to") for node in graph.nodes if node.op_type == "Cast"} == {INT32}


def test_integers_of_32_bits_need_no_cast():
    graph, _ = graph_of_two(starts=INT32)
    to_plugin_nodes(graph)
    assert [node.output[0] for node in graph.nodes if node.op_type == "Cast"] == ["shapes:int32"]


def test_tensorrts_plugin_is_named_as_tensorrt_names_it():
    graph, _ = graph_of_two()
    to_plugin_nodes(graph, "tensorrt")
    assert [node.op_type for node in graph.nodes] == [
        *("Cast", "Cast", "MultiscaleDeformableAttnPlugin_TRT", "Reshape", "Reshape"),
        *("MultiscaleDeformableAttnPlugin_TRT", "Reshape"),
    ]


@pytest.mark.parametrize(
    ("plugin", "kinds", "message"),
    [
        ("own", (HALF, HALF, HALF), "takes sampling_locations in float, .* sampling_locations float16"),
        ("own", (HALF, FLOAT, FLOAT), "attention_weights in one type, .* value float16"),
        ("tensorrt", (HALF, FLOAT, HALF), "node first: TensorRT's own plugin .* --keep-fp32 MSDeformAttn"),
        ("tensorrt", (BF16, BF16, BF16), "all in float or all in float16, .* value bfloat16"),
    ],
)
def test_types_that_a_plugin_does_not_take_are_refused(plugin, kinds, message):
    graph, _ = graph_of_two(**dict(zip(("value", "locations", "weights"), kinds, strict=True)))
    with pytest.raises(UserError, match=message):
        to_plugin_nodes(graph, plugin)


@pytest.mark.parametrize(
    ("plugin", "kinds"),
    [("own", (FLOAT, FLOAT, FLOAT)), ("own", (HALF, FLOAT, HALF)), ("own", (BF16, FLOAT, BF16)),
     ("tensorrt", (FLOAT, FLOAT, FLOAT)), ("tensorrt", (HALF, HALF, HALF))],
)  # fmt: skip
def test_types_that_a_plugin_takes(plugin, kinds):
    graph, _ = graph_of_two(**dict(zip(("value", "locations", "weights"), kinds, strict=True)))
    to_plugin_nodes(graph, plugin)


def test_a_node_with_an_input_too_few_is_refused():
    graph, _ = graph_of_two()
    del graph.nodes[2].input[4:]
    with pytest.raises(UserError, match=r"node second: MSDeformAttn has 4 inputs, expected value, spatial_shapes"):
        to_plugin_nodes(graph)


def test_the_parsers_take_a_plugin_or_the_function():
    graph, _ = graph_of_two()
    check(graph.model, TENSORRT)
    with pytest.raises(UserError, match=r"node first: MSDeformAttn has no function in this file and TensorRT-RTX"):
        check(graph.model, RTX)
    graph, _ = graph_of_two(function=True)
    check(graph.model, RTX)
    to_plugin_nodes(graph, "tensorrt")
    with pytest.raises(UserError, match=r"TensorRT-RTX 1\.7 takes no plugins"):
        check(graph.model, RTX)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("tensorrt", {"embed_plugin": True}, "with --ms-deform-attn tensorrt leave --embed-plugin and"),
        ("tensorrt", {"version_compatible": True}, "and --version-compatible out"),
        ("tensorrt", {}, "has no multi-scale deformable attention; leave --ms-deform-attn out"),
        ("tensorrt-rtx", {}, "TensorRT-RTX takes no plugins, so --ms-deform-attn has no effect"),
    ],
)
def test_options_that_do_not_fit(backend, options, message, tmp_path):
    model = color_model(tmp_path / "model.onnx")
    compiler = Compiler(backend, "10.13.0" if backend == "tensorrt" else "1.7.1")
    with pytest.raises(UserError, match=message):
        prepare(model, compiler, BuildOptions(ms_deform_attn="tensorrt", **options))


def test_an_unknown_plugin(tmp_path):
    with pytest.raises(UserError, match="ms_deform_attn is 'mmcv', expected one of own, tensorrt"):
        build_engine("model.onnx", tmp_path / "model.engine", ms_deform_attn="mmcv")
    wrong = CliRunner().invoke(command, ["model.onnx", "-o", "model.engine", "--ms-deform-attn", "mmcv"])
    assert wrong.exit_code == 2
    assert "'mmcv' is not one of 'own', 'tensorrt'" in wrong.output


@pytest.mark.parametrize("wanted", [False, True])
def test_tensorrts_own_plugins_are_registered_where_they_are_wanted(wanted, tmp_path):
    trt = fake_tensorrt.make()
    model = str(color_model(tmp_path / "model.onnx"))
    job = Job("tensorrt", model, model, str(tmp_path / "x.engine"), EXPECTED, tensorrt_plugins=wanted)
    compile_engine(trt, job, lambda event: None, threading.Event())
    assert trt.own_plugins == ([""] if wanted else [])
    trt.init_libnvinfer_plugins = lambda logger, namespace: False
    if wanted:
        with pytest.raises(UserError, match=r"TensorRT's own plugins do not load.*leave --ms-deform-attn out"):
            compile_engine(trt, job, lambda event: None, threading.Event())
