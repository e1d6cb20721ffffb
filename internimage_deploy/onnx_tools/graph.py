# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph to edit: its element types, its constants, and saving it with its weights outside the protobuf.

Weights stay on disk until they are read, so that a model of several gigabytes can be edited in little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy.errors import UserError, escaped, one_line, quoted

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
_INLINE_BYTES = 4096  # tensors below this size stay in the protobuf

# Operators whose result has an element type of its own; for all others it is that of an input (`_SOURCE`, else 0).
_RESULT = {
    **dict.fromkeys(("Shape", "Size", "ArgMax", "ArgMin", "NonZero"), TensorProto.INT64),
    **dict.fromkeys(
        ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "IsNaN", "IsInf"),
        TensorProto.BOOL,
    ),
}
_SOURCE = {"Where": 1, "CastLike": 1, "OneHot": 2}
_SECOND_RESULT = {"TopK": TensorProto.INT64, "MaxPool": TensorProto.INT64, "Dropout": TensorProto.BOOL}


@dataclass
class Graph:
    """A model whose external weights lie in `folder`.

    Attributes:
        model: the model; external weights are not loaded.
        folder: where its external data files are.
        new_weights: values of initializers that are not written yet, by name; `save` writes them.
    """

    model: onnx.ModelProto
    folder: Path
    new_weights: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """The main graph's nodes, in order."""
        return self.model.graph.node

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 1)

    def initializers(self) -> dict[str, TensorProto]:
        """Stored tensors by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def array(self, tensor: TensorProto) -> npt.NDArray[Any]:
        """The value of a stored tensor, read from disk where it is external. Raises `UserError` where it is damaged."""
        try:
            return np.asarray(numpy_helper.to_array(tensor, base_dir=str(self.folder)))
        except (ValueError, TypeError, KeyError, onnx.checker.ValidationError) as error:
            raise UserError(
                f"weight '{quoted(tensor.name)}' is damaged ({one_line(error)}); export the model again"
            ) from error

    def replace_nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Make `nodes` the main graph's nodes."""
        kept = list(nodes)
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)

    def names(self) -> set[str]:
        """Every value name in use."""
        used = {name for node in self.nodes for name in (*node.input, *node.output)}
        used.update(tensor.name for tensor in self.model.graph.initializer)
        used.update(value.name for value in (*self.model.graph.input, *self.model.graph.output))
        return used


def words(text: str) -> frozenset[str]:
    """The words of `text` as a set."""
    return frozenset(text.split())


class UniqueNames:
    """Makes value names that no other value has."""

    def __init__(self, used: set[str]) -> None:
        self._used = used

    def new(self, preferred: str) -> str:
        """`preferred`, with a number after it where it is taken."""
        name, count = preferred, 1
        while name in self._used:
            count += 1
            name = f"{preferred}_{count}"
        self._used.add(name)
        return name


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default`. Raises `UserError` where it is of no known type."""
    for entry in node.attribute:
        if entry.name == name:
            try:
                return helper.get_attribute_value(entry)
            except ValueError as error:
                raise damaged(node) from error
    return default


def damaged(node: onnx.NodeProto) -> UserError:
    """The error for a node that no exporter would write."""
    return UserError(f"node {node_name(node)}: a damaged {quoted(node.op_type)}; export the model again")


def constants_to_initializers(graph: Graph) -> None:
    """Turn `Constant` nodes into initializers, so that initializers are the only constants.

    Raises:
        UserError: the graph holds a control-flow operator, which no exported segmentation model has.
    """
    kept = []
    for node in graph.nodes:
        if node.op_type in ("If", "Loop", "Scan"):
            raise UserError(f"node {node_name(node)}: {node.op_type} cannot be put into an engine here")
        tensor = _constant(node) if node.op_type == "Constant" and not node.domain else None
        if tensor is None:
            kept.append(node)
        else:
            graph.model.graph.initializer.append(tensor)
    graph.replace_nodes(kept)


def _constant(node: onnx.NodeProto) -> TensorProto | None:
    if len(node.attribute) != 1 or len(node.output) != 1:
        raise damaged(node)
    entry = node.attribute[0]
    value = attribute(node, entry.name)
    if entry.name == "value":
        if not isinstance(value, TensorProto):
            raise damaged(node)
        tensor = TensorProto()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
        return tensor
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if entry.name not in kinds:
        return None
    try:
        return numpy_helper.from_array(np.array(value, kinds[entry.name]), node.output[0])
    except (TypeError, ValueError, OverflowError) as error:
        raise damaged(node) from error


def element_types(graph: Graph) -> dict[str, int]:
    """The element type (`TensorProto.DataType`) of every value of the main graph.

    ONNX's shape inference would stop at operators that it does not know; types need no shapes.
    """
    types: dict[str, int] = {}
    for value in graph.model.graph.input:
        types[value.name] = value.type.tensor_type.elem_type
    for tensor in graph.model.graph.initializer:
        types[tensor.name] = tensor.data_type
    for node in graph.nodes:
        for index, name in enumerate(node.output):
            types[name] = _result_type(node, index, types)
    return types


def _result_type(node: onnx.NodeProto, index: int, types: dict[str, int]) -> int:
    if index and node.op_type in _SECOND_RESULT:
        return _SECOND_RESULT[node.op_type]
    if node.op_type == "Cast":
        to = attribute(node, "to")
        if not isinstance(to, int):
            raise damaged(node)
        return to
    if node.op_type in ("ConstantOfShape", "Constant"):
        value = attribute(node, "value")
        if value is not None and not isinstance(value, TensorProto):
            raise damaged(node)
        return FLOAT if value is None else int(value.data_type)
    if node.op_type in _RESULT and not node.domain:
        return _RESULT[node.op_type]
    source = _SOURCE.get(node.op_type, 0)
    return types.get(node.input[source], TensorProto.UNDEFINED) if len(node.input) > source else TensorProto.UNDEFINED


def node_name(node: onnx.NodeProto) -> str:
    """The node's name, or its first output's where it has none, without control characters."""
    return escaped(str(node.name or (node.output[0] if node.output else node.op_type)))


def save(graph: Graph, path: Path) -> None:
    """Write the model to `path`, its large weights to `path`.data beside it.

    Weights are copied one at a time.

    Raises:
        OSError: the disk is full or the folder cannot be written to.
    """
    data = path.with_name(path.name + ".data")
    with data.open("wb") as out:
        for tensor in graph.model.graph.initializer:
            array = graph.new_weights.pop(tensor.name, None)
            if array is None and tensor.data_location != TensorProto.EXTERNAL and tensor.ByteSize() < _INLINE_BYTES:
                continue
            raw = graph.array(tensor).tobytes() if array is None else array.tobytes()
            if len(raw) < _INLINE_BYTES:  # runtimes read shapes before they look at other files
                _clear(tensor)
                tensor.raw_data = raw
                continue
            out.write(b"\0" * (-out.tell() % 64))
            _point_at(tensor, data.name, out.tell(), len(raw))
            out.write(raw)
        empty = out.tell() == 0
    if empty:
        data.unlink()
    path.write_bytes(graph.model.SerializeToString())
    graph.folder = path.parent


def _point_at(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    _clear(tensor)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _clear(tensor: TensorProto) -> None:
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "external_data", "data_location"):
        tensor.ClearField(name)


def consumers(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    """Value name -> the nodes that read it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def drop_unused(graph: Graph) -> None:
    """Leave out the nodes and stored tensors that no output of the model needs, in place."""
    model = graph.model.graph
    producer = {name: index for index, node in enumerate(graph.nodes) for name in node.output}
    needed: set[int] = set()
    read = {value.name for value in model.output}
    waiting = list(read)
    while waiting:
        index = producer.get(waiting.pop())
        if index is not None and index not in needed:
            needed.add(index)
            waiting.extend(graph.nodes[index].input)
            read.update(graph.nodes[index].input)
    gone = {name for index, node in enumerate(graph.nodes) if index not in needed for name in node.output}
    graph.replace_nodes([node for index, node in enumerate(graph.nodes) if index in needed])
    _keep(model.initializer, lambda tensor: tensor.name in read)
    _keep(model.value_info, lambda value: value.name not in gone)


def _keep(entries: Any, wanted: Callable[[Any], bool]) -> None:
    """Leave in a repeated protobuf field those entries that are wanted."""
    kept = [entry for entry in entries if wanted(entry)]
    del entries[:]
    entries.extend(kept)


def operators(model: onnx.ModelProto) -> Iterator[tuple[str, str, str]]:
    """(domain, operator, node name) of every node, those inside functions included."""
    for node in model.graph.node:
        yield node.domain, node.op_type, node_name(node)
    for function in model.functions:
        for node in function.node:
            yield node.domain, node.op_type, f"{function.name}/{node_name(node)}"
