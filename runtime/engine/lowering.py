# SPDX-License-Identifier: Apache-2.0
"""Decomposes operators that a parser lacks into ones it has (`operators` lists them), exactly.

TensorRT casts to uint8 from floating point only, so integer labels are also cast to float32 first, which holds every
class id exactly. Before 10.0 its parser overlooks which part of a shape a Shape node returns, so a Slice takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import (
    BFLOAT16,
    FLOAT,
    Graph,
    UniqueNames,
    attribute,
    element_types,
    node_name,
    words,
)
from internimage_deploy.onnx_tools.opset import ADDED_ATTRIBUTES, decompose_layer_norm
from internimage_deploy.runtime.engine.operators import Parser

_INTEGERS = (TensorProto.INT64, TensorProto.INT32)


class Emitter:
    """Makes the nodes that replace one node, named after it."""

    def __init__(self, graph: Graph, names: UniqueNames, node: onnx.NodeProto, kind: int) -> None:
        self.graph, self.names, self.node, self.kind = graph, names, node, kind
        self.nodes: list[onnx.NodeProto] = []

    def op(self, op_type: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        """Append a node; returns its output's name, which is `result` unless that is empty."""
        name = self.names.new(f"{node_name(self.node)}/{op_type}")
        self.nodes.append(helper.make_node(op_type, list(inputs), [result or name], name=name, **attributes))
        return result or name

    def number(self, value: float, role: str) -> str:
        """A scalar constant of the node's element type."""
        name = self.names.new(f"{node_name(self.node)}/{role}")
        if self.kind == BFLOAT16:
            bits = np.float32(value).view(np.uint32)
            tensor = TensorProto(name=name, data_type=BFLOAT16)
            tensor.raw_data = np.uint16((int(bits) + 0x7FFF + ((int(bits) >> 16) & 1)) >> 16).tobytes()
        else:
            tensor = numpy_helper.from_array(np.array(value, helper.tensor_dtype_to_np_dtype(self.kind)), name)
        self.graph.model.graph.initializer.append(tensor)
        return name

    def index(self, value: int, role: str) -> str:
        """A constant of one int64, as Slice takes them."""
        name = self.names.new(f"{node_name(self.node)}/{role}")
        self.graph.model.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
        return name


def lower(graph: Graph, parser: Parser) -> tuple[str, ...]:
    """Decompose what `parser` cannot read, in place; returns the operators that were decomposed.

    Raises:
        UserError: a node uses an option of its operator that cannot be decomposed.
    """
    types = element_types(graph)
    names = UniqueNames(graph.names())
    done: list[str] = []
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        rule = None
        if node.domain in ("", "ai.onnx"):
            if node.op_type in RULES and not parser.reads(node.op_type):
                rule = RULES[node.op_type]
            elif _integers_to_uint8(node, types):
                rule = _labels_through_float
            elif node.op_type == "Shape" and node.attribute and not parser.reads_parts_of_shapes:
                rule = _part_of_shape
        if rule is None:
            nodes.append(node)
            continue
        emit = Emitter(graph, names, node, types.get(node.input[0], FLOAT))
        rule(emit, types)
        nodes.extend(emit.nodes)
        done.append(node.op_type)
    graph.replace_nodes(nodes)
    _lower_opset(graph, parser)
    return tuple(dict.fromkeys(done))


def lower_cast_like(graph: Graph, types: dict[str, int]) -> None:
    """Replace every CastLike of the main graph by a Cast to the type it stands for."""
    for node in graph.nodes:
        if node.op_type == "CastLike" and not node.domain:
            to = types[node.input[1]]
            del node.input[1:], node.attribute[:]
            node.op_type = "Cast"
            node.attribute.append(helper.make_attribute("to", to))


def _integers_to_uint8(node: onnx.NodeProto, types: dict[str, int]) -> bool:
    return (
        node.op_type == "Cast" and attribute(node, "to") == TensorProto.UINT8 and types.get(node.input[0]) in _INTEGERS
    )


def _labels_through_float(emit: Emitter, types: dict[str, int]) -> None:
    real = emit.op("Cast", emit.node.input[0], to=FLOAT)
    emit.op("Cast", real, result=emit.node.output[0], to=TensorProto.UINT8)


def _part_of_shape(emit: Emitter, types: dict[str, int]) -> None:
    start = attribute(emit.node, "start", 0)
    end = attribute(emit.node, "end", np.iinfo(np.int64).max)
    whole = emit.op("Shape", emit.node.input[0])
    emit.op("Slice", whole, emit.index(start, "start"), emit.index(end, "end"), result=emit.node.output[0])


def _gelu(emit: Emitter, types: dict[str, int]) -> None:
    """x/2 * (1 + erf(x / sqrt 2)), or its tanh form x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""
    x = emit.node.input[0]
    half, one = emit.number(0.5, "half"), emit.number(1.0, "one")
    kind = attribute(emit.node, "approximate", b"none")
    if kind == b"tanh":
        cube = emit.op("Mul", emit.op("Mul", x, x), x)
        inner = emit.op("Add", x, emit.op("Mul", cube, emit.number(0.044715, "cubic")))
        activation = emit.op("Tanh", emit.op("Mul", inner, emit.number(math.sqrt(2 / math.pi), "slope")))
    else:
        activation = emit.op("Erf", emit.op("Mul", x, emit.number(math.sqrt(0.5), "slope")))
    emit.op("Mul", emit.op("Mul", x, half), emit.op("Add", activation, one), result=emit.node.output[0])


def _cast_like(emit: Emitter, types: dict[str, int]) -> None:
    name = node_name(emit.node)
    kind = types.get(emit.node.input[1], TensorProto.UNDEFINED)
    if kind == TensorProto.UNDEFINED:
        raise UserError(
            f"node {node_name(emit.node)}: the type that CastLike copies is unknown; export the model again"
        )
    emit.nodes.append(helper.make_node("Cast", emit.node.input[:1], emit.node.output, name=name, to=kind))


def _layer_norm(emit: Emitter, types: dict[str, int]) -> None:
    node = emit.node
    if attribute(node, "axis", -1) != -1 or len(node.output) > 1:
        raise UserError(
            f"node {node_name(node)}: only a LayerNormalization over the last axis, with one output, can be decomposed"
        )
    x, weight, *rest = node.input
    epsilon = emit.number(attribute(node, "epsilon", 1e-5), "epsilon")
    decompose_layer_norm(emit.op, x, weight, rest[0] if rest and rest[0] else None, epsilon)
    emit.nodes[-1].output[0] = node.output[0]


RULES: dict[str, Callable[[Emitter, dict[str, int]], None]] = {
    "Gelu": _gelu,
    "CastLike": _cast_like,
    "LayerNormalization": _layer_norm,
}

# Later versions of these take more types, and have attributes that may be left out, but mean the same.
ONLY_NEW_TYPES = words(
    "Cast Concat Constant ConstantOfShape Equal Flatten Identity Reshape Shape Size Split Squeeze Transpose Unsqueeze "
    "Conv ConvTranspose AveragePool MaxPool GlobalAveragePool Dropout Resize HardSwish Relu"
)
_GRID_MODES = {b"linear": b"bilinear", b"cubic": b"bicubic"}


def _lower_opset(graph: Graph, parser: Parser) -> None:
    """Rewrite operators of a later version than an 8.x parser knows; newer parsers follow the model's opset."""
    newest = parser.newest_opset
    if parser.backend == "tensorrt-rtx" or parser.version >= (9, 1) or graph.opset <= newest:
        return
    stored = graph.initializers()
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx") or since(node.op_type, graph.opset) <= newest:
            continue
        if node.op_type.startswith("Reduce"):
            _axes_to_attribute(graph, node, stored)
        elif node.op_type == "GridSample":
            mode = attribute(node, "mode", b"linear")
            _drop(node, "mode")
            node.attribute.append(helper.make_attribute("mode", _GRID_MODES.get(mode, mode)))
        elif node.op_type in ONLY_NEW_TYPES:
            for name in ADDED_ATTRIBUTES.get(node.op_type, ()):
                _drop(node, name)
        else:
            raise UserError(
                f"node {node_name(node)}: {parser} reads operators up to opset {newest}, and {node.op_type} is of "
                f"opset {since(node.op_type, graph.opset)}; export the checkpoint again with --opset {newest}"
            )
    for entry in graph.model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = newest


def since(op_type: str, opset: int) -> int:
    """The first opset with the version of a standard operator that `opset` has."""
    return int(onnx.defs.get_schema(op_type, opset).since_version)


def _axes_to_attribute(graph: Graph, node: onnx.NodeProto, stored: dict[str, TensorProto]) -> None:
    if node.op_type == "ReduceSum" or len(node.input) < 2:  # ReduceSum takes its axes as an input since opset 13
        return
    if node.input[1] not in stored:
        raise UserError(
            f"node {node_name(node)}: axes that are computed do not exist in opset 17; export the model again"
        )
    axes = graph.array(stored[node.input[1]]).tolist()
    del node.input[1:]
    _drop(node, "noop_with_empty_axes")
    node.attribute.append(helper.make_attribute("axes", axes))


def _drop(node: onnx.NodeProto, name: str) -> None:
    for index, entry in enumerate(node.attribute):
        if entry.name == name:
            del node.attribute[index]
            return
