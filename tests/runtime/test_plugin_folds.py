# SPDX-License-Identifier: Apache-2.0
"""What `build-engine` puts into plugins for TensorRT computes the same: ONNX Runtime runs both graphs."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.onnx_tools.graph import attribute
from internimage_deploy.operators import contract, upsample_argmax
from internimage_deploy.operators.onnx_function import dcnv3_function
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.plugin_folds import allow_half, fuse_argmax, pack_offset_masks
from internimage_deploy.runtime.engine.plugin_nodes import to_plugin_nodes
from internimage_deploy.runtime.engine.prepare import BuildOptions, prepare, write_graph
from support import golden
from support.engine_models import DYNAMIC, FLOAT, compute, exported, normal, small
from support.plugin_functions import define_plugins
from support.tiny_models import color_model

ENDLESS = 2**63 - 1


def layer(group=2, channels=4, *, starts=None, ends=None, axis=3, steps=1, **changed):
    """A DCNv3 layer as the exporter writes it: one product for offsets and mask, two slices, the node."""
    middle = group * 18
    bounds = {"offset": (0, middle), "mask": (middle, ENDLESS)}
    for name, start in (starts or {}).items():
        bounds[name] = start, bounds[name][1]
    for name, end in (ends or {}).items():
        bounds[name] = bounds[name][0], end
    constants = {
        "weight": normal(group * channels, group * 27, scale=0.2, seed=1),
        "axis": np.int64([axis]),
        "steps": np.int64([steps]),
    }
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["both"], "both")]
    for name, (start, end) in bounds.items():
        constants |= {f"{name}.start": np.int64([start]), f"{name}.end": np.int64([end])}
        inputs = ["both", f"{name}.start", f"{name}.end", "axis", "steps"]
        nodes.append(helper.make_node("Slice", inputs, [name], name))
    attributes = {"group": group, "group_channels": channels, "mask_softmax": 1} | changed
    nodes.append(helper.make_node("DCNv3", ["x", "offset", "mask"], ["y"], "dcn", domain=contract.DOMAIN, **attributes))
    shape = {"x": (FLOAT, [1, 6, 7, group * channels])}
    graph = small(nodes, shape, {"y": shape["x"]}, constants=constants, domains=(contract.DOMAIN,))
    graph.model.functions.append(dcnv3_function(graph.opset, mask_softmax=True))
    return graph


def kinds(graph):
    return [node.op_type for node in graph.nodes]


def test_offsets_and_mask_are_read_from_the_product():
    graph = layer()
    x = normal(1, 6, 7, 8)
    expected = compute(graph, x=x)
    assert pack_offset_masks(graph) == 1
    to_plugin_nodes(graph)
    assert kinds(graph) == ["MatMul", contract.PACKED_OP_TYPE]
    node = graph.nodes[-1]
    assert list(node.input) == ["x", "both"]
    assert {entry.name for entry in contract.ATTRIBUTES} <= {entry.name for entry in node.attribute}
    define_plugins(graph.model)
    np.testing.assert_array_equal(compute(graph, x=x), expected)


@pytest.mark.parametrize(
    "changed",
    [
        {"group": 1},  # 27 columns: pairs would straddle words
        {"starts": {"offset": 1}, "ends": {"offset": 37}},
        {"ends": {"mask": 53}},
        {"starts": {"mask": 35}},
        {"ends": {"mask": 54}},  # what follows the mask is unknown
        {"steps": 2},
        {"axis": 2},
        {"kernel_h": 5, "pad_h": 2},
    ],
    ids=str,
)
def test_other_slices_stay(changed):
    graph = layer(**changed)
    before = kinds(graph)
    assert pack_offset_masks(graph) == 0
    assert kinds(graph) == before


def test_slices_of_two_tensors_stay():
    graph = layer()
    graph.nodes[2].input[0] = "other"
    graph.model.graph.node.insert(1, helper.make_node("Neg", ["both"], ["other"], "other"))
    assert pack_offset_masks(graph) == 0


def test_a_slice_with_another_reader_stays():
    graph = layer()
    graph.model.graph.output.append(helper.make_tensor_value_info("offset", FLOAT, [1, 6, 7, 36]))
    assert pack_offset_masks(graph) == 1
    assert kinds(graph) == ["MatMul", "Slice", contract.PACKED_OP_TYPE]
    to_plugin_nodes(graph)
    define_plugins(graph.model)
    onnx.checker.check_model(graph.model)


def tail(
    *, scales=(1, 1, 4, 4), axis=1, keepdims=0, last=0, mode="linear", centres="half_pixel", dtype=TensorProto.UINT8
):
    """The end of an exported network: upsampling, argmax over the classes, the type of the labels."""
    nodes = [
        helper.make_node(
            "Resize", ["logits", "", "scales"], ["up"], "up", mode=mode, coordinate_transformation_mode=centres
        ),
        helper.make_node("ArgMax", ["up"], ["best"], "best", axis=axis, keepdims=keepdims, select_last_index=last),
        helper.make_node("Cast", ["best"], ["labels"], "labels", to=dtype),
    ]
    shape = {"logits": (FLOAT, ["n", 5, "h", "w"])}
    graph = small(nodes, shape, {"labels": (dtype, ["n", "height", "width"])}, constants={"scales": np.float32(scales)})
    graph.model.graph.value_info.append(
        helper.make_tensor_value_info("best", TensorProto.INT64, ["n", "height", "width"])
    )
    graph.model.opset_import.append(helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION))
    return graph


@pytest.mark.parametrize("dtype", [TensorProto.UINT8, TensorProto.INT32], ids=["uint8", "int32"])
@pytest.mark.parametrize("centres", ["half_pixel", "pytorch_half_pixel"])
def test_upsampling_and_argmax_become_one_node(centres, dtype):
    graph = tail(centres=centres, dtype=dtype)
    logits = normal(2, 5, 6, 7)
    expected = compute(graph, logits=logits)
    assert fuse_argmax(graph) == 1
    to_plugin_nodes(graph)
    assert kinds(graph) == [upsample_argmax.OP_TYPE, "Cast"]
    assert attribute(graph.nodes[0], "plugin_version") == b"1"
    define_plugins(graph.model)
    labels = compute(graph, logits=logits)
    assert labels.dtype == expected.dtype
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    "changed",
    [
        {"scales": (1, 1, 2, 2)},
        {"scales": (1, 1, 4, 8)},
        {"axis": 2},
        {"keepdims": 1},
        {"last": 1},
        {"mode": "nearest"},
        {"mode": "cubic"},
        {"centres": "align_corners"},
        {"centres": "asymmetric"},
    ],
    ids=str,
)
def test_other_tails_stay(changed):
    graph = tail(**changed)
    assert fuse_argmax(graph) == 0
    assert kinds(graph) == ["Resize", "ArgMax", "Cast"]


def test_upsampled_logits_that_are_returned_stay():
    graph = tail()
    graph.model.graph.output.append(helper.make_tensor_value_info("up", FLOAT, ["n", 5, "height", "width"]))
    assert fuse_argmax(graph) == 0


def test_kernels_in_float16_are_allowed_by_an_attribute():
    graph = layer()
    pack_offset_masks(graph)
    allow_half(graph)
    to_plugin_nodes(graph)
    assert attribute(graph.nodes[-1], "allow_half") == 1
    assert {entry.name for entry in contract.PLUGIN_ATTRIBUTES} <= {entry.name for entry in graph.nodes[-1].attribute}


TENSORRT = Compiler("tensorrt", "10.13.0")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_whole_network_computes_the_same_labels(precision, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
    labels, operators = [], []
    for options in (
        BuildOptions(precision=precision, pack_offsets=False, fuse_argmax=False),
        BuildOptions(precision=precision),
        BuildOptions(precision=precision, half_interpolation=precision == "fp16"),
    ):
        prepared = prepare(exported(*DYNAMIC), TENSORRT, options)
        operators.append(prepared.plugins)
        slices = [node for node in prepared.graph.nodes if node.op_type == "Slice" and ".dcn/" in node.name]
        assert bool(slices) == (not options.pack_offsets or has_odd_groups(prepared.graph))
        path, _ = write_graph(prepared, tmp_path)
        model = onnx.load(path)
        define_plugins(model)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        labels.append(session.run(None, {"image": images})[0])
    assert operators[0] == ("DCNv3",)
    assert operators[1] == operators[2]
    assert set(operators[1]) >= {"DCNv3Packed", "UpsampleArgmax"}
    assert labels[0].dtype == np.uint8
    # In float16 the plugin interpolates in float32, where the graph's Resize rounds: near ties may fall otherwise.
    least = 1 if precision == "fp32" else 0.995
    assert (labels[0] == labels[1]).mean() >= least
    np.testing.assert_array_equal(labels[1], labels[2])


def has_odd_groups(graph):
    """Whether a DCNv3 layer has a group number whose offsets and mask together are odd in number."""
    return any(attribute(node, "group") % 2 for node in graph.nodes if node.op_type == contract.OP_TYPE)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_end_of_mask2former_is_the_same(precision, exports):
    options = ExportOptions(size=tuple(golden.case("m2f_h_like")["input"][2:]), input="float")
    prepared = prepare(exports("m2f_h_like", options).path, TENSORRT, BuildOptions(precision=precision))
    # The level with one group keeps its slices.
    assert prepared.plugins == ("DCNv3", "DCNv3Packed", "MSDeformAttn", "UpsampleArgmax")


@pytest.mark.parametrize(
    ("backend", "changed", "message"),
    [
        ("tensorrt-rtx", {"pack_offsets": False}, "no plugins, so --no-pack-offsets has no effect"),
        ("tensorrt-rtx", {"fuse_argmax": False}, "no plugins, so --no-fuse-argmax has no effect"),
        ("tensorrt-rtx", {"half_interpolation": True, "precision": "fp16"}, "so --half-interpolation has no effect"),
        ("tensorrt", {"half_interpolation": True}, "--half-interpolation .* needs --fp16"),
        ("tensorrt", {"half_interpolation": True, "precision": "bf16"}, "--half-interpolation .* needs --fp16"),
    ],
)
def test_options_that_have_no_effect_are_refused(backend, changed, message, tmp_path):
    model = color_model(tmp_path / "model.onnx")
    with pytest.raises(UserError, match=message):
        prepare(model, Compiler(backend, "10.13.0"), BuildOptions(**changed))
