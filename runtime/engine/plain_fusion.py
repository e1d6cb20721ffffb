# SPDX-License-Identifier: Apache-2.0
"""UPerNet's fusion convolutions back in their plain form: upsample, concatenate, one 3x3 convolution.

`export-onnx` writes conv3x3(concat(x0, up(x1), ...)) as conv3x3(x0) plus, for each smaller map, a 1x1 convolution at
the map's own size and two products with interpolation matrices (`exporter/rewrites/fusion.py` has the proof). That is
fewer multiply-adds in many more operations, of which a GPU may or may not make something fast, so the engine can be
built of either form.

Identity. Row o * 9 + 3 * ky + kx of a 1x1 weight is the kernel's point (ky, kx) for output channel o, so

    K[o, c, ky, kx] = W[o * 9 + 3 * ky + kx, c]

are the numbers of the plain kernel in their own order, and the products interpolate bilinearly with half-pixel centres,
as Resize does. Nothing is computed anew; the sums run in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from internimage_deploy.onnx_tools.graph import Graph, UniqueNames, attribute, consumers, drop_unused

# The transposition of (N, O, 3, 3, h, w) between the 1x1 convolution and the products.
_SPLIT_POINTS = [0, 1, 2, 4, 3, 5]
_CHAIN = ("Reshape", "Transpose", "Reshape", "MatMul", "MatMul", "Add")  # from the 1x1 convolution to the sum


@dataclass(frozen=True)
class _Term:
    """A smaller map's part of the sum."""

    mix: onnx.NodeProto  # its 1x1 convolution
    add: onnx.NodeProto  # that adds it to the sum
    before: str  # the other operand of `add`


@dataclass(frozen=True)
class _Fusion:
    """One rewritten convolution."""

    first: onnx.NodeProto  # the 3x3 convolution of the largest map
    terms: tuple[_Term, ...]  # in the order in which they are added


def is_rewritten(graph: Graph) -> bool:
    """True when `graph` has a fusion convolution in the rewritten form."""
    return next(_fusions(graph), None) is not None


def make_plain(graph: Graph) -> int:
    """Turn every rewritten fusion convolution of a float32 `graph` into its plain form; returns how many there were."""
    stored = graph.initializers()
    names = UniqueNames(graph.names())
    fusions = list(_fusions(graph))
    replacement = {fusion.terms[-1].add.name: _plain(graph, fusion, stored, names) for fusion in fusions}
    if not fusions:
        return 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        nodes.extend(replacement.get(node.name, (node,)))
    graph.replace_nodes(nodes)
    drop_unused(graph)
    return len(fusions)


def _fusions(graph: Graph) -> Iterator[_Fusion]:
    """The rewritten fusion convolutions, each found from the sum that ends it."""
    stored = graph.initializers()
    readers = consumers(graph.nodes)
    producers = {name: node for node in graph.nodes for name in node.output}
    terms = {term.add.name: term for node in graph.nodes if (term := _term(node, stored, readers)) is not None}
    for term in terms.values():
        if any(reader.name in terms for reader in readers.get(term.add.output[0], ())):
            continue  # not the last one
        chain = [term]
        while (node := producers.get(chain[0].before)) is not None and node.name in terms:
            chain.insert(0, terms[node.name])
        if node is not None and _is_padded_3x3(node, stored) and len(readers[node.output[0]]) == 1:
            yield _Fusion(node, tuple(chain))


def _term(
    node: onnx.NodeProto, stored: dict[str, onnx.TensorProto], readers: dict[str, list[onnx.NodeProto]]
) -> _Term | None:
    """The term that begins with `node`, if it is the 1x1 convolution of one."""
    if node.op_type != "Conv" or len(node.input) != 2 or node.input[1] not in stored:
        return None
    dims = stored[node.input[1]].dims
    if list(dims[2:]) != [1, 1] or dims[0] % 9:
        return None
    last = node
    for op_type in _CHAIN:
        following = readers.get(last.output[0], [])
        if len(following) != 1 or following[0].op_type != op_type:
            return None
        if op_type == "Transpose" and attribute(following[0], "perm") != _SPLIT_POINTS:
            return None
        last, value = following[0], last.output[0]
    return _Term(node, last, last.input[0] if last.input[1] == value else last.input[1])


def _is_padded_3x3(node: onnx.NodeProto, stored: dict[str, onnx.TensorProto]) -> bool:
    return (
        node.op_type == "Conv"
        and node.input[1] in stored
        and list(stored[node.input[1]].dims[2:]) == [3, 3]
        and attribute(node, "pads") == [1, 1, 1, 1]
        and attribute(node, "group", 1) == 1
        and attribute(node, "strides", [1, 1]) == [1, 1]
        and attribute(node, "dilations", [1, 1]) == [1, 1]
    )


def _plain(
    graph: Graph, fusion: _Fusion, stored: dict[str, onnx.TensorProto], names: UniqueNames
) -> list[onnx.NodeProto]:
    """The nodes of one plain fusion convolution; its weight becomes an initializer of `graph`."""
    first, last = fusion.first, fusion.terms[-1].add
    place = first.name.removesuffix(".conv/Conv")
    kernels = [graph.array(stored[first.input[1]])]
    nodes: list[onnx.NodeProto] = []

    def op(op_type: str, *inputs: str, **attributes: Any) -> str:
        name = names.new(f"{place}/{op_type}")
        nodes.append(helper.make_node(op_type, list(inputs), [name], name, **attributes))
        return name

    size = op("Shape", first.input[0], start=2, end=4)
    maps = [first.input[0]]
    for term in fusion.terms:
        x, weight = term.mix.input
        sizes = op("Concat", op("Shape", x, start=0, end=2), size, axis=0)
        maps.append(op("Resize", x, "", "", sizes, mode="linear", coordinate_transformation_mode="half_pixel"))
        points = graph.array(stored[weight])
        kernels.append(points.reshape(-1, 3, 3, points.shape[1]).transpose(0, 3, 1, 2))
    joined = op("Concat", *maps, axis=1)
    kernel = numpy_helper.from_array(np.concatenate(kernels, axis=1), names.new(f"{place}.conv.weight:plain"))
    graph.model.graph.initializer.append(kernel)
    conv = helper.make_node(
        "Conv", [joined, kernel.name, *first.input[2:]], [last.output[0]], first.name, kernel_shape=[3, 3], pads=[1] * 4
    )
    return [*nodes, conv]
