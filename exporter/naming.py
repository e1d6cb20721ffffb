# SPDX-License-Identifier: Apache-2.0
"""From the graph that PyTorch's exporter writes to the graph we ship: names, sizes, the functions of our operators."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import onnx_ir as ir

from internimage_deploy._version import __version__
from internimage_deploy.exporter.options import SIZE_DIVISOR
from internimage_deploy.onnx_tools.logits import LOGITS
from internimage_deploy.operators import contract, ms_deform_attn
from internimage_deploy.operators.ms_deform_attn_function import ms_deform_attn_function
from internimage_deploy.operators.onnx_function import dcnv3_function

if TYPE_CHECKING:
    import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_everything(model: ir.Model, input_name: str, output_name: str) -> None:
    """Name nodes after the module they come from ("backbone.levels.0.blocks.1.dcn/DCNv3"), values after their node.

    Weights keep the names they have in the checkpoint; constants are named after the node that reads them.
    """
    graph = model.graph
    used: Counter[str] = Counter()
    for index, node in enumerate(graph):
        node.name = f"node{index}"  # out of the way of the names to come
        for value in node.outputs:
            value.name = f"node{index}:{value.index()}"
    _name_constants(graph, used)
    for node in graph:
        node.name = _unique("/".join(filter(None, (_scope(node), node.op_type))), used)
        for value in node.outputs:
            value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{value.index()}"
    _logits(graph).name = LOGITS
    graph.inputs[0].name = input_name
    graph.outputs[0].name = output_name


def _name_constants(graph: ir.Graph, used: Counter[str]) -> None:
    """Rename what the exporter or its constant folding left without a name from the checkpoint."""
    for name, value in list(graph.initializers.items()):
        if re.fullmatch(r"[a-z_]+\.[\w.]*(weight|bias|gamma\d|running_\w+|mean|scale)", name):
            used[name] += 1
            continue
        if not value.uses():  # PyTorch's lowering of adaptive pooling leaves such constants behind
            del graph.initializers[name]
            continue
        reader, index = next(iter(value.uses()))
        tensor = value.const_value
        if tensor is not None and tensor.size == 1:
            label = f"constants/{tensor.dtype.name.lower()}_{tensor.numpy().item():g}"
        elif reader.op_type == "MatMul" and index == 1:
            label = f"{_scope(reader)}.weight_transposed"
        else:
            label = f"{_scope(reader)}/{reader.op_type}.input{index}"
        value.name = _unique(label, used)


def _unique(name: str, used: Counter[str]) -> str:
    used[name] += 1
    return name if used[name] == 1 else _unique(f"{name}_{used[name] - 1}", used)


def _scope(node: ir.Node) -> str:
    """The path of the module that `node` belongs to: its weight's, or the one it was traced in.

    A node that an optimisation made takes its neighbour's.
    """
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is not None and weight.is_initializer() and str(weight.name).endswith(".weight"):
        return str(weight.name).removesuffix(".weight")
    current: ir.Node | None = node
    while current is not None:
        scopes = current.metadata_props.get(_SCOPES)
        if scopes:
            # ['', 'backbone', ..., the module, the operation]
            path = str(ast.literal_eval(scopes)[-2])
            return "" if path.startswith("_") else path  # PyTorch's own hooks, around the first size computations
        current = next((value.producer() for value in current.inputs if value is not None and value.producer()), None)
    return ""


def _logits(graph: ir.Graph) -> ir.Value:
    output = graph.outputs[0]
    for node in graph:
        if node.op_type == "Resize" and _scope(node) == "postprocess":
            value = node.inputs[0]
            assert value is not None
            return value
    return output


def name_sizes(model: ir.Model) -> None:
    """Call free sizes "batch", "height", "width", and what derives from them "height/4", "width/32"."""
    names = {}
    for position, dim in enumerate(_dims(model.graph.inputs[0])):
        symbol = re.search(r"[a-z]+\d+", str(dim)) if isinstance(dim, ir.SymbolicDim) else None
        if symbol is not None:
            height = 1 if _dims(model.graph.inputs[0])[-1] == 3 else 2
            names[symbol[0]] = "batch" if position == 0 else "height" if position == height else "width"
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_named(dim, names) for dim in _dims(value)])


def _named(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    """`dim` under its new name; None (unknown) where it is no simple multiple of an input's size."""
    if isinstance(dim, int):
        return dim
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z]+\d+)", str(dim.value).replace(" ", ""))
    if match is None or match[2] not in names:
        return None
    factor, name = int(match[1] or 1), names[match[2]]
    if name == "batch":
        return name if factor == 1 else None
    if SIZE_DIVISOR % factor:
        return None
    return name if factor == SIZE_DIVISOR else f"{name}/{SIZE_DIVISOR // factor}"


def _dims(value: ir.Value) -> list[int | ir.SymbolicDim]:
    assert value.shape is not None
    return list(value.shape.dims)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def add_functions(model: ir.Model) -> None:
    """Give the model the functions that define its DCNv3 and MSDeformAttn nodes, and their domain.

    Raises:
        ValueError: the DCNv3 nodes disagree on `mask_softmax`, or the MSDeformAttn nodes on the number of levels.
    """
    opset = model.opset_imports[""]
    softmax = {node.attributes["mask_softmax"].as_int() for node in _nodes(model, contract.OP_TYPE)}
    if softmax:
        _add_function(model, dcnv3_function(opset, mask_softmax=bool(_only(softmax, "mask_softmax"))))
    levels = {_levels(node) for node in _nodes(model, ms_deform_attn.OP_TYPE)}
    if levels:
        _add_function(model, ms_deform_attn_function(opset, _only(levels, "the number of levels")))
    model.opset_imports[contract.DOMAIN] = contract.OPSET_VERSION


def _nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (contract.DOMAIN, op_type)]


def _only(values: set[int], what: str) -> int:
    if len(values) != 1:
        raise ValueError(f"nodes disagree on {what}: {sorted(values)}")
    return values.pop()


def _levels(node: ir.Node) -> int:
    """The number of levels of an MSDeformAttn node: the fourth size of its sampling locations (N, Q, M, L, P, 2)."""
    locations = node.inputs[ms_deform_attn.INPUTS.index("sampling_locations")]
    assert locations is not None
    levels = _dims(locations)[3]
    assert isinstance(levels, int)
    return levels


def _add_function(model: ir.Model, proto: onnx.FunctionProto) -> None:
    function = ir.serde.deserialize_function(proto)
    model.functions[function.identifier()] = function


def strip(model: ir.Model) -> None:
    """Remove traces of the machine and the program that traced the model, and name this program as the producer."""
    model.producer_name, model.producer_version = "internimage-deploy", __version__
    model.doc_string = model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*_values(model.graph), *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
        if value.is_initializer():
            value.type = value.shape = None  # the tensor has its own
        if value.const_value is not None:
            value.const_value.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
