# SPDX-License-Identifier: Apache-2.0
"""Statistics of a graph: its operators, its parameters, and its multiply-adds at one input size.

Sizes are followed node by node with ONNX's own shape inference; where a shape is itself computed in the graph (dynamic
models), the small integer tensors behind it are computed with ONNX's reference implementation.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.card import ModelCard
from internimage_deploy.errors import escaped, one_line, quoted
from internimage_deploy.onnx_tools.model_file import external_files
from internimage_deploy.operators import contract, ms_deform_attn

if TYPE_CHECKING:
    import onnx

# Values are computed only because shapes may depend on them; larger tensors are data.
_LARGEST_VALUE = 4096

# A sampled value is a sum of four neighbours with bilinear weights, times one weight of the mask.
_MACS_PER_SAMPLE = 5


@dataclass(frozen=True)
class GraphStatistics:
    """Sizes and counts of a graph.

    Attributes:
        operators: node count by operator, most frequent first; operators of other domains as "domain::name".
        parameters: number of floating-point values in the initializers.
        file_bytes: size on disk, external data included.
        opset: version of the standard operators.
    """

    operators: dict[str, int]
    parameters: int
    file_bytes: int
    opset: int

    @property
    def nodes(self) -> int:
        """Number of nodes; a DCNv3 counts as one."""
        return sum(self.operators.values())


def graph_statistics(model: onnx.ModelProto, path: Path) -> GraphStatistics:
    """The statistics of `model`, which was read from `path`."""
    operators = Counter(
        quoted(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}")
        for node in model.graph.node
    )
    floats = _floating_point_types()
    companions = [path.parent / name for name in external_files(model)]
    return GraphStatistics(
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        parameters=sum(math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in floats),
        file_bytes=path.stat().st_size + sum(file.stat().st_size for file in companions),
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
    )


def multiply_adds(
    model: onnx.ModelProto, card: ModelCard, size: tuple[int, int], folder: Path, batch: int = 1
) -> dict[str, int]:
    """Multiply-adds by operator for one run at `size` (height, width), largest first.

    Counted: Conv, ConvTranspose, MatMul, Gemm, Einsum, and five per sample of DCNv3 and MSDeformAttn. Elementwise work,
    normalisation and resizing are not.

    Raises:
        UnknownShape: a node's output size depends on the data, or a node is damaged.
    """
    shape = (batch, *size, 3) if card.takes_uint8 else (batch, 3, *size)
    total: Counter[str] = Counter()
    place = "a weight"
    try:
        tracker = _ShapeTracker(model, folder)
        tracker.shapes[card.input.name] = (_elem_type(card.input.dtype), shape)
        for node in model.graph.node:
            place = f"{quoted(node.op_type)} '{quoted(node.name)}'"
            tracker.visit(node)
            if count := tracker.cost(node):
                total[node.op_type] += count
    except UnknownShape:
        raise
    except Exception as error:  # a damaged graph makes ONNX's own functions fail in any way
        raise UnknownShape(f"{place} is damaged ({type(error).__name__}: {one_line(error)})") from error
    return dict(total.most_common())


class UnknownShape(Exception):
    """A size depends on the data, so it is known only after the model has run."""

    def __init__(self, message: str) -> None:
        super().__init__(escaped(message))


class _ShapeTracker:
    """Shapes, and small values, of the tensors of the nodes visited so far."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        import onnx
        from onnx import numpy_helper

        self.shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.values: dict[str, npt.NDArray[Any]] = {}
        self._opsets = list(model.opset_import)
        self._versions = {entry.domain: entry.version for entry in model.opset_import}
        for tensor in model.graph.initializer:
            self.shapes[tensor.name] = (tensor.data_type, tuple(tensor.dims))
            if math.prod(tensor.dims) <= _LARGEST_VALUE:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    copy = onnx.TensorProto()
                    copy.CopyFrom(tensor)
                    onnx.external_data_helper.load_external_data_for_tensor(copy, str(folder))
                    tensor = copy
                self.values[tensor.name] = numpy_helper.to_array(tensor)

    def visit(self, node: onnx.NodeProto) -> None:
        """Infer the outputs of `node`."""
        if _is_dcnv3(node):
            element, data = self.shapes[node.input[0]]
            _, offset = self.shapes[node.input[1]]
            self.shapes[node.output[0]] = (element, (data[0], offset[1], offset[2], data[3]))
            return
        if _is_ms_deform_attn(node):
            element, value = self.shapes[node.input[0]]
            _, locations = self.shapes[node.input[3]]
            self.shapes[node.output[0]] = (element, (value[0], locations[1], value[2] * value[3]))
            return
        if self._compute(node):
            return
        for name, kind in self._infer(node).items():
            if not kind.HasField("tensor_type"):
                continue
            dims = kind.tensor_type.shape.dim
            if not kind.tensor_type.HasField("shape") or any(not dim.HasField("dim_value") for dim in dims):
                raise UnknownShape(f"the size of '{quoted(name)}' ({quoted(node.op_type)}) depends on the data")
            self.shapes[name] = (kind.tensor_type.elem_type, tuple(dim.dim_value for dim in dims))

    def cost(self, node: onnx.NodeProto) -> int:
        """Multiply-adds of `node`, whose outputs are known."""
        if _is_dcnv3(node):
            samples = math.prod(self._shape(node.input[2])) // self._attribute(node, "group", 1)
            return samples * self._shape(node.input[0])[3] * _MACS_PER_SAMPLE
        if _is_ms_deform_attn(node):
            return math.prod(self._shape(node.input[4])) * self._shape(node.input[0])[3] * _MACS_PER_SAMPLE
        inputs = [self._shape(name) for name in node.input if name]
        out = math.prod(self._shape(node.output[0])) if node.output[0] in self.shapes else 0
        if node.op_type == "Conv":
            return out * math.prod(inputs[1][1:])
        if node.op_type == "ConvTranspose":
            return math.prod(inputs[0]) * math.prod(inputs[1][1:])
        if node.op_type == "MatMul":
            return out * inputs[0][-1]
        if node.op_type == "Gemm":
            return out * inputs[0][0 if self._attribute(node, "transA", 0) else 1]
        if node.op_type == "Einsum":
            terms = self._attribute(node, "equation", b"").decode().replace(" ", "").split("->")[0].split(",")
            pairs = zip(terms, inputs, strict=True)
            sizes = {letter: dim for term, shape in pairs for letter, dim in zip(term, shape, strict=True)}
            return math.prod(sizes.values())
        return 0

    def _compute(self, node: onnx.NodeProto) -> bool:
        """Compute `node` if its inputs' values are known and small; returns whether it was computed."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        names = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size") and names[0] in self.shapes:
            known = {names[0]: np.broadcast_to(np.float32(0), self._shape(names[0]))}
        elif all(name in self.values for name in names):
            known = {name: self.values[name] for name in names}
        else:
            return False
        if node.op_type in _MAKES_SIZES and not _is_small(node, known, names):
            return False
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_value_info(name, helper.make_tensor_type_proto(1, None)) for name in known],
            [helper.make_value_info(name, helper.make_tensor_type_proto(1, None)) for name in node.output if name],
        )
        try:
            results = ReferenceEvaluator(helper.make_model(graph, opset_imports=self._opsets)).run(None, known)
        except Exception:  # no reference implementation: shape inference is tried next
            return False
        for name, value in zip([name for name in node.output if name], results, strict=True):
            value = np.asarray(value)
            self.shapes[name] = (helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            if value.size <= _LARGEST_VALUE:
                self.values[name] = value
        return True

    def _infer(self, node: onnx.NodeProto) -> dict[str, onnx.TypeProto]:
        import onnx
        from onnx import defs, helper, numpy_helper

        names = [name for name in node.input if name]
        missing = [name for name in names if name not in self.shapes]
        if missing:
            raise UnknownShape(f"the size of '{quoted(missing[0])}', an input of {quoted(node.op_type)}, is unknown")
        try:
            schema = defs.get_schema(node.op_type, self._versions.get(node.domain, 1), node.domain)
            return onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: helper.make_tensor_type_proto(*self.shapes[name]) for name in names},
                {name: numpy_helper.from_array(self.values[name]) for name in names if name in self.values},
                opset_imports=self._opsets,
            )
        except (defs.SchemaError, onnx.shape_inference.InferenceError) as error:
            raise UnknownShape(f"{quoted(node.op_type)} '{quoted(node.name)}': {one_line(error)}") from error

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name][1]

    def _attribute(self, node: onnx.NodeProto, name: str, default: Any) -> Any:
        import onnx

        for attribute in node.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return default


# Operators whose small inputs can make a large output.
_MAKES_SIZES = ("ConstantOfShape", "EyeLike", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample")


def _is_small(node: onnx.NodeProto, known: dict[str, npt.NDArray[Any]], names: list[str]) -> bool:
    """Whether the output of one of `_MAKES_SIZES` is small; False where that is hard to say."""
    if node.op_type == "ConstantOfShape":
        return math.prod(known[names[0]].tolist()) <= _LARGEST_VALUE
    if node.op_type == "Expand":
        return math.prod(known[names[1]].tolist()) * known[names[0]].size <= _LARGEST_VALUE
    if node.op_type == "Range":
        start, limit, delta = (float(known[name]) for name in names)
        return bool(delta) and abs((limit - start) / delta) <= _LARGEST_VALUE
    if node.op_type == "Tile":
        return math.prod(known[names[1]].tolist()) * known[names[0]].size <= _LARGEST_VALUE
    return False


def _is_dcnv3(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) in (
        (contract.DOMAIN, contract.OP_TYPE),
        (contract.OFFICIAL_DOMAIN, contract.OFFICIAL_OP_TYPE),
    )


def _is_ms_deform_attn(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (contract.DOMAIN, ms_deform_attn.OP_TYPE)


def _elem_type(dtype: str) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _floating_point_types() -> tuple[int, ...]:
    from onnx import TensorProto

    return (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
