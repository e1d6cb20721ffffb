# SPDX-License-Identifier: Apache-2.0
"""Standard operators of an older version: PyTorch's exporter writes opset 18, older TensorRT parsers read 16 or 17."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from internimage_deploy.onnx_tools.opset import ADDED_ATTRIBUTES, decompose_layer_norm

TRACED_OPSET = 18


def lower_opset(model: ir.Model, opset: int) -> None:
    """Rewrite the graph from opset 18 to `opset` (16 to 18), exactly.

    Raises:
        ValueError: an operator of the graph has no counterpart there.
    """
    if opset == TRACED_OPSET:
        return
    for node in list(model.graph):
        if node.domain:
            continue
        if node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            _axes_to_attribute(node)
        elif node.op_type in ADDED_ATTRIBUTES:
            for name in ADDED_ATTRIBUTES[node.op_type]:
                node.attributes.pop(name, None)
        elif node.op_type == "LayerNormalization" and opset < 17:
            _decompose_layer_norm(node)
        elif node.op_type == "Pad" and len(node.inputs) < 4:
            pass  # opset 18 added `axes`, nothing else
        elif onnx.defs.get_schema(node.op_type, TRACED_OPSET).since_version > opset:
            raise ValueError(f"{node.name}: {node.op_type} has no form in opset {opset}")
    model.opset_imports[""] = opset
    for node in model.graph:
        node.version = None


def _axes_to_attribute(node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return
    axes = node.inputs[1].const_value
    if axes is None:
        raise ValueError(f"{node.name}: {node.op_type} over axes that are computed has no form before opset 18")
    node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)


def _decompose_layer_norm(node: ir.Node) -> None:
    x, weight, *rest = node.inputs
    bias = rest[0] if rest else None
    if node.attributes.get_int("axis", -1) != -1 or x is None or weight is None:
        raise ValueError(f"{node.name}: only a LayerNormalization over the last axis can be decomposed")
    epsilon = _constant(node, "epsilon", node.attributes.get_float("epsilon", 1e-5))

    def emit(op_type: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        new = ir.node(op_type, inputs, attributes)
        new.metadata_props.update(node.metadata_props)
        result = new.outputs[0]
        result.name = f"{node.name}:{len(nodes)}"
        result.type = x.type
        nodes.append(new)
        return result

    nodes: list[ir.Node] = []
    result = decompose_layer_norm(emit, x, weight, bias, epsilon)
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, node.outputs[:1], [result])


def _constant(node: ir.Node, role: str, number: float) -> ir.Value:
    assert node.graph is not None
    tensor = ir.tensor(np.array(number, np.float32), name=f"{node.name}/{role}")
    value = ir.val(tensor.name, const_value=tensor, dtype=ir.DataType.FLOAT, shape=ir.Shape([]))
    node.graph.register_initializer(value)
    return value
