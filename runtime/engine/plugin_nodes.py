# SPDX-License-Identifier: Apache-2.0
"""The nodes of our operators as the parser needs them: functions for TensorRT-RTX, plugin nodes for TensorRT.

Whether a function or a plugin of the same name wins changed twice between versions of TensorRT's parser, and a plugin's
namespace counts in some and not in others. A node without a function, with `plugin_version` and `plugin_namespace`
written on it, means the plugin in all of them.

TensorRT has a plugin of its own for multi-scale deformable attention. It takes all floating-point inputs in one type,
sampling locations too, and returns heads and channels as two dimensions. Source: NVIDIA/TensorRT,
plugin/multiscaleDeformableAttnPlugin.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import (
    FLOAT,
    FLOAT16,
    Graph,
    UniqueNames,
    attribute,
    element_types,
    node_name,
)
from internimage_deploy.operators import contract, ms_deform_attn, upsample_argmax
from internimage_deploy.runtime.engine.engine_backend import MsDeformAttnPlugin

_PACKED = (contract.DOMAIN, contract.PACKED_OP_TYPE)
_NAMES = {(contract.DOMAIN, contract.OP_TYPE), _PACKED, (contract.OFFICIAL_DOMAIN, contract.OFFICIAL_OP_TYPE)}
_MS_DEFORM_ATTN = (contract.DOMAIN, ms_deform_attn.OP_TYPE)
_UPSAMPLE_ARGMAX = (contract.DOMAIN, upsample_argmax.OP_TYPE)
# (domain, operator) of the nodes that `to_plugin_nodes` writes.
PLUGIN_OPERATORS = {
    (contract.DOMAIN, contract.OP_TYPE),
    _PACKED,
    _MS_DEFORM_ATTN,
    (contract.DOMAIN, ms_deform_attn.TENSORRT_OP_TYPE),
    _UPSAMPLE_ARGMAX,
}

_FLOATS = ("value", "sampling_locations", "attention_weights")
_INTEGERS = ("spatial_shapes", "level_start_index")


def dcnv3_nodes(graph: Graph) -> list[onnx.NodeProto]:
    """The DCNv3 nodes of the main graph, ours (packed ones too) and the official exporter's."""
    return [node for node in graph.nodes if (node.domain, node.op_type) in _NAMES]


def ms_deform_attn_nodes(graph: Graph) -> list[onnx.NodeProto]:
    """The MSDeformAttn nodes of the main graph."""
    return [node for node in graph.nodes if (node.domain, node.op_type) == _MS_DEFORM_ATTN]


def rename_official(graph: Graph) -> int:
    """Turn `mmdeploy::TRTDCNv3` nodes into `internimage::DCNv3`; returns how many there were.

    Raises:
        UserError: a node has an attribute that the operator does not know.
    """
    known = {entry.name for entry in contract.ATTRIBUTES}
    renamed = 0
    for node in dcnv3_nodes(graph):
        if node.op_type != contract.OFFICIAL_OP_TYPE:
            continue
        kept = [entry for entry in node.attribute if entry.name != "im2col_step"]
        for entry in kept:
            if entry.name not in known:
                raise UserError(f"node {node_name(node)}: {node.op_type} has an unknown attribute '{entry.name}'")
        del node.attribute[:]
        node.attribute.extend(kept)
        node.op_type, node.domain = contract.OP_TYPE, contract.DOMAIN
        renamed += 1
    if renamed:
        imports = [entry for entry in graph.model.opset_import if entry.domain != contract.OFFICIAL_DOMAIN]
        del graph.model.opset_import[:]
        graph.model.opset_import.extend(imports)
        if not any(entry.domain == contract.DOMAIN for entry in imports):
            graph.model.opset_import.append(helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION))
    return renamed


def to_plugin_nodes(graph: Graph, ms_deform_attn_plugin: MsDeformAttnPlugin = "own") -> None:
    """Drop the functions and make every DCNv3 and MSDeformAttn node name its plugin, in place.

    Args:
        graph: the graph, in its final element types.
        ms_deform_attn_plugin: "own" for the plugin of this project, "tensorrt" for the one that TensorRT brings.

    Raises:
        UserError: the inputs of an MSDeformAttn node have types that its plugin does not take.
    """
    functions = [f for f in graph.model.functions if (f.domain, f.name) not in (*_NAMES, _MS_DEFORM_ATTN)]
    del graph.model.functions[:]
    graph.model.functions.extend(functions)
    for node in dcnv3_nodes(graph):
        _write_default_attributes(node)
        _write_plugin_fields(node)
    for node in graph.nodes:
        if (node.domain, node.op_type) == _UPSAMPLE_ARGMAX:
            _write_plugin_fields(node)
    nodes = ms_deform_attn_nodes(graph)
    if not nodes:
        return
    types = element_types(graph)
    for node in nodes:
        _check_types(node, types, ms_deform_attn_plugin)
        _write_plugin_fields(node)
    _cast_integers(graph, types)
    if ms_deform_attn_plugin == "tensorrt":
        _to_tensorrt_plugin(graph)


def plugin_operators(graph: Graph) -> tuple[str, ...]:
    """The operators that plugins run, each once, in alphabetical order."""
    return tuple(sorted({node.op_type for node in graph.nodes if (node.domain, node.op_type) in PLUGIN_OPERATORS}))


def _write_plugin_fields(node: onnx.NodeProto) -> None:
    for name, text in (("plugin_version", contract.PLUGIN_VERSION), ("plugin_namespace", contract.PLUGIN_NAMESPACE)):
        if attribute(node, name) is None:
            node.attribute.append(helper.make_attribute(name, text))


def _check_types(node: onnx.NodeProto, types: dict[str, int], plugin: MsDeformAttnPlugin) -> None:
    """Check the floating-point inputs of an MSDeformAttn node."""
    if len(node.input) != len(ms_deform_attn.INPUTS):
        raise UserError(
            f"node {node_name(node)}: {node.op_type} has {len(node.input)} inputs, expected "
            f"{', '.join(ms_deform_attn.INPUTS)}; export the model again"
        )
    kinds = {name: types.get(node.input[ms_deform_attn.INPUTS.index(name)], TensorProto.UNDEFINED) for name in _FLOATS}
    value, locations, weights = kinds.values()
    got = ", ".join(f"{name} {TensorProto.DataType.Name(kind).lower()}" for name, kind in kinds.items())
    if plugin == "tensorrt":
        if not (value == locations == weights and value in (FLOAT, FLOAT16)):
            raise UserError(
                f"node {node_name(node)}: TensorRT's own plugin takes {', '.join(_FLOATS)} all in float or all in "
                f"float16, and this node has {got}; keep it in float32 with --keep-fp32 {ms_deform_attn.OP_TYPE}, or "
                "leave --ms-deform-attn out"
            )
    elif locations != FLOAT or value != weights:
        raise UserError(
            f"node {node_name(node)}: {node.op_type} takes sampling_locations in float, and value and "
            f"attention_weights in one type, and this node has {got}; export the model again in float32"
        )


def _cast_integers(graph: Graph, types: dict[str, int]) -> None:
    """Give the MSDeformAttn nodes their integer inputs as int32, with one cast for each tensor."""
    names = UniqueNames(graph.names())
    cast: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if (node.domain, node.op_type) == _MS_DEFORM_ATTN:
            for slot in map(ms_deform_attn.INPUTS.index, _INTEGERS):
                name = node.input[slot]
                if types.get(name) == TensorProto.INT32:
                    continue
                if name not in cast:
                    cast[name] = names.new(f"{name}:int32")
                    kept.append(
                        helper.make_node("Cast", [name], [cast[name]], f"{cast[name]}/Cast", to=TensorProto.INT32)
                    )
                node.input[slot] = cast[name]
        kept.append(node)
    graph.replace_nodes(kept)


def _to_tensorrt_plugin(graph: Graph) -> None:
    """Turn the MSDeformAttn nodes into nodes of TensorRT's own plugin, which keeps heads and channels apart."""
    names = UniqueNames(graph.names())
    joined = names.new(f"{ms_deform_attn.OP_TYPE}:joined")
    graph.model.graph.initializer.append(numpy_helper.from_array(np.array([0, 0, -1], np.int64), joined))
    kept: list[onnx.NodeProto] = []
    for node in graph.nodes:
        kept.append(node)
        if (node.domain, node.op_type) == _MS_DEFORM_ATTN:
            node.op_type = ms_deform_attn.TENSORRT_OP_TYPE
            output, node.output[0] = node.output[0], names.new(f"{node.output[0]}:heads")
            kept.append(helper.make_node("Reshape", [node.output[0], joined], [output], f"{output}/Reshape"))
    graph.replace_nodes(kept)


def _write_default_attributes(node: onnx.NodeProto) -> None:
    """Add the attributes that the node leaves at their defaults: the parser passes on only those that it has."""
    for entry in contract.ATTRIBUTES:
        if attribute(node, entry.name) is not None:
            continue
        if entry.default is None:
            raise UserError(f"node {node_name(node)}: the attribute '{entry.name}' is missing; export the model again")
        value = float(entry.default) if entry.type == "float" else int(entry.default)
        node.attribute.append(helper.make_attribute(entry.name, value))
