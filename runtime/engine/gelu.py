# SPDX-License-Identifier: Apache-2.0
"""The chain of operators that computes a GELU, as one `Gelu` node for parsers that read it.

Identity. Gelu(x) is defined as x / 2 * (1 + erf(x / sqrt 2)), which models are exported as in five nodes:

    Div(x, sqrt 2) -> Erf -> Add(1) -> Mul(x) -> Mul(0.5)

A compiler that does not recognise the chain runs five kernels, and in float16 each of them rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from internimage_deploy.onnx_tools.graph import Graph, UniqueNames, attribute, consumers, drop_unused, node_name
from internimage_deploy.runtime.engine.lowering import ONLY_NEW_TYPES, since

OPSET = 20  # the first with Gelu
_SAME = ("CastLike", "GridSample", "Pad")  # later versions take more types, modes and inputs


def raise_gelu(graph: Graph) -> int:
    """Turn every GELU of a float32 `graph` into one node, in place; returns how many.

    None are where an operator of the graph means something else in opset 20.
    """
    found = list(_chains(graph))
    if not found or not _raise_opset(graph):
        return 0
    replacement = {
        last.output[0]: helper.make_node("Gelu", [source], list(last.output), last.name) for source, last in found
    }
    graph.replace_nodes([replacement.get(node.output[0], node) for node in graph.nodes])
    drop_unused(graph)
    return len(found)


def _chains(graph: Graph) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The value that each GELU is computed of, and its last node."""
    stored = graph.initializers()
    readers = consumers(graph.nodes)

    def only_reader(node: onnx.NodeProto, op_type: str) -> onnx.NodeProto | None:
        following = readers.get(node.output[0], [])
        return following[0] if len(following) == 1 and following[0].op_type == op_type else None

    def has_constant(node: onnx.NodeProto, expected: float) -> bool:
        constants = [stored[name] for name in node.input if name in stored]
        if len(constants) != 1 or math.prod(constants[0].dims) != 1:
            return False
        return math.isclose(float(graph.array(constants[0]).item()), expected, rel_tol=1e-6)

    for node in graph.nodes:
        if node.op_type != "Div" or node.input[1] not in stored or not has_constant(node, math.sqrt(2)):
            continue
        erf = only_reader(node, "Erf")
        add = erf and only_reader(erf, "Add")
        product = add and only_reader(add, "Mul")
        last = product and only_reader(product, "Mul")
        if (
            add
            and product
            and last
            and has_constant(add, 1.0)
            and sorted(product.input) == sorted((node.input[0], add.output[0]))
            and has_constant(last, 0.5)
        ):
            yield node.input[0], last


def _raise_opset(graph: Graph) -> bool:
    """Make `graph` and its functions of opset 20, where every operator means the same; returns whether they do."""
    model = graph.model
    reductions = [node for node in graph.nodes if node.op_type.startswith("Reduce") and _changed(graph, node)]
    inside = [node for function in model.functions for node in function.node]
    if not all(_is_the_same(graph, node) for node in (*graph.nodes, *inside) if node not in reductions):
        return False
    names = UniqueNames(graph.names())
    for node in reductions:
        _axes_to_input(graph, node, names)
    for node in (*graph.nodes, *inside):
        if node.op_type == "GridSample":  # its modes have other names
            mode = next((entry for entry in node.attribute if entry.name == "mode"), None)
            if mode is not None:
                mode.s = {b"bilinear": b"linear", b"bicubic": b"cubic"}.get(mode.s, mode.s)
    for imports in (model.opset_import, *(function.opset_import for function in model.functions)):
        for entry in imports:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, OPSET)
    model.ir_version = max(model.ir_version, 9)
    return True


def _changed(graph: Graph, node: onnx.NodeProto) -> bool:
    return since(node.op_type, graph.opset) != since(node.op_type, OPSET)


def _is_the_same(graph: Graph, node: onnx.NodeProto) -> bool:
    """True when `node` means the same in opset 20, but for names of `GridSample`'s modes."""
    if node.domain not in ("", "ai.onnx"):
        return True
    if node.op_type == "Split" and len(node.input) == 1:  # a later version asks for the number of parts
        return False
    return not _changed(graph, node) or node.op_type in ONLY_NEW_TYPES or node.op_type in _SAME


def _axes_to_input(graph: Graph, node: onnx.NodeProto, names: UniqueNames) -> None:
    axes = attribute(node, "axes")
    if axes is not None:
        name = names.new(f"{node_name(node)}/axes")
        graph.model.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), name))
        node.input.append(name)
        kept = [entry for entry in node.attribute if entry.name != "axes"]
        del node.attribute[:]
        node.attribute.extend(kept)
