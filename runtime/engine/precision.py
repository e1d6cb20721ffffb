# SPDX-License-Identifier: Apache-2.0
"""From a float32 graph to a strongly typed float16 or bfloat16 graph.

TensorRT 11 and TensorRT-RTX take element types from the graph, so precision is decided here, node by node:

- matrix products, convolutions, DCNv3 and what moves or rescales features run in the low precision;
- normalisation (also when decomposed into simple operators), softmax, reductions and pooling stay in float32, because
  their sums are long (`STATISTICS`);
- whatever follows from integers alone (pixel values before the first layer, sizes, sampling coordinates,
  interpolation matrices) stays in float32 up to the first layer that computes features with it;
- the residual sums of post-normalised blocks stay in float32: the sum grows over the depth of the network;
- a node with a constant beyond float16's range stays in float32;
- Mask2Former's masks and sampling locations stay in float32 (`sensitive`).

Inside DCNv3 coordinates, weights and sums are float32 whatever its inputs are (`operators.contract`).
Inputs and outputs of the model keep their types. Every value is cast at most once per type.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import (
    BFLOAT16,
    FLOAT,
    FLOAT16,
    Graph,
    UniqueNames,
    constants_to_initializers,
    consumers,
    element_types,
    node_name,
    words,
)
from internimage_deploy.operators import ms_deform_attn
from internimage_deploy.runtime.engine.lowering import lower_cast_like
from internimage_deploy.runtime.engine.sensitive import LOCATIONS, sensitive_nodes

LowPrecision = Literal["fp16", "bf16"]

STATISTICS = words(
    "LayerNormalization GroupNormalization InstanceNormalization BatchNormalization LpNormalization LRN "
    "MeanVarianceNormalization Softmax LogSoftmax ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2 ReduceLogSum "
    "ReduceLogSumExp ReduceProd CumSum AveragePool GlobalAveragePool LpPool GlobalLpPool Pow Sqrt Reciprocal Exp Log "
    "Range GridSample RoiAlign"
)
# Products that are reductions all the same: pyramid pooling with averaging matrices, and the covariance behind a group
# norm of Mask2Former.
POOLING_NAMES = ("*psp_modules.*.0/MatMul*", "*fine_map.affine/*")
# Operators that compute features; a chain of exact values ends at them.
_FEATURES = words("Conv ConvTranspose MatMul Gemm Einsum DCNv3 MSDeformAttn")
_ELEMENTWISE = words("Add Sub Mul Div")
# A normalised branch reaches its residual sum through these.
_AFTER_NORM = words("Mul Identity Cast Reshape Transpose Squeeze Unsqueeze Dropout")
# Inputs whose type the operator fixes to float32.
_FIXED_SLOTS = {"Resize": (1, 2), "Upsample": (1,), ms_deform_attn.OP_TYPE: (LOCATIONS,)}
_LARGEST_HALF = 65504.0


def convert(
    graph: Graph, precision: LowPrecision, *, keep: Sequence[str] = (), all_products_low: bool = False
) -> tuple[str, ...]:
    """Convert `graph` in place; see the module's rules.

    Args:
        graph: a float32 model. New weights land in `graph.new_weights` until it is saved.
        precision: `fp16` or `bf16`.
        keep: further nodes to keep in float32: operator types, node names, or name patterns with `*`.
        all_products_low: convert the pooling products too, for a target without float32 products.

    Returns:
        What stayed in float32: operator types of `STATISTICS` and names of other nodes.

    Raises:
        UserError: the graph is not float32, or a pattern of `keep` matches nothing.
    """
    low = FLOAT16 if precision == "fp16" else BFLOAT16
    constants_to_initializers(graph)
    types = element_types(graph)
    lower_cast_like(graph, types)
    for name, kind in types.items():
        if kind in (FLOAT16, BFLOAT16, TensorProto.DOUBLE):
            raise UserError(
                f"--{precision} converts float32 models, and '{name}' is {TensorProto.DataType.Name(kind).lower()}; "
                "export the checkpoint again in float32"
            )
    pooling = () if all_products_low else POOLING_NAMES
    full = _nodes_in_full(graph, types, precision, (*pooling, *keep))
    _Rewriter(graph, types, low, full).run()
    statistics = {node.op_type for node in graph.nodes if node_name(node) in full and node.op_type in STATISTICS}
    return (*sorted(statistics), *(name for name, kind in full.items() if kind not in STATISTICS))


def _nodes_in_full(
    graph: Graph, types: dict[str, int], precision: LowPrecision, patterns: Sequence[str]
) -> dict[str, str]:
    """{node name: operator} of the nodes that compute in float32, in graph order."""
    unmatched = set(patterns) - set(POOLING_NAMES)
    sensitive = sensitive_nodes(graph, types)
    too_large = _beyond_float16(graph) if precision == "fp16" else set()
    stored = {tensor.name for tensor in graph.model.graph.initializer}
    readers = consumers(graph.nodes)
    exact: set[str] = set()  # follows from integers alone
    normed: set[str] = set()  # a normalised branch on its way to a residual sum
    statistics: set[str] = set()  # mean and deviation of a normalisation that is decomposed into simple operators
    centred: set[str] = set()  # the input less its mean
    full: dict[str, str] = {}
    for node in graph.nodes:
        floats = [name for name in node.input if types.get(name) == FLOAT]
        results = [name for name in node.output if types.get(name) == FLOAT]
        matches = {p for p in patterns if p == node.op_type or fnmatch.fnmatchcase(node_name(node), p)}
        unmatched -= matches
        varying = [name for name in floats if name not in stored]
        if results and node.op_type not in _FEATURES and all(name in exact for name in varying):
            exact.update(results)
            full[node_name(node)] = node.op_type
        if node.op_type == "LayerNormalization" or (
            node.op_type in _AFTER_NORM and any(name in normed for name in varying)
        ):
            # A value with further readers is the trunk itself after a norm, not a branch on its way to the sum.
            normed.update(name for name in results if len(readers.get(name, ())) == 1)
        if node.op_type in ("ReduceMean", "Sqrt"):
            statistics.update(results)
        part_of_norm = node.op_type in _ELEMENTWISE and any(name in statistics for name in varying)
        part_of_norm |= node.op_type == "Mul" and len(set(varying)) == 1 and varying[0] in centred
        if part_of_norm and node.op_type == "Sub":
            centred.update(results)
        residual = node.op_type == "Add" and len(varying) == 2 and any(name in normed for name in varying)
        keeps = (
            node.op_type in STATISTICS
            or matches
            or residual
            or part_of_norm
            or any(name in too_large for name in floats)
            or node_name(node) in sensitive
        )
        if keeps and (floats or results):
            full[node_name(node)] = node.op_type
    if unmatched:
        raise UserError(f"--keep-fp32 {sorted(unmatched)[0]}: no node has this name or operator type")
    return full


def _beyond_float16(graph: Graph) -> set[str]:
    """Names of stored float32 tensors with a value that float16 cannot hold."""
    large = set()
    for tensor in graph.model.graph.initializer:
        if tensor.data_type == FLOAT:
            array = graph.array(tensor)
            if array.size and not float(np.abs(array).max()) <= _LARGEST_HALF:
                large.add(tensor.name)
    return large


class _Rewriter:
    """Sets the types that every node runs in, with casts and second copies of constants where they differ."""

    def __init__(self, graph: Graph, types: dict[str, int], low: int, full: dict[str, str]) -> None:
        self.graph, self.types, self.low, self.full = graph, types, low, full
        self.names = UniqueNames(graph.names())
        self.stored = graph.initializers()
        inputs = graph.model.graph.input
        self.have: dict[str, int] = {value.name: FLOAT for value in inputs if types[value.name] == FLOAT}
        self.cast: dict[tuple[str, int], str] = {}
        self.used: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        outputs = {value.name for value in self.graph.model.graph.output}
        for node in list(self.graph.nodes):
            kind = FLOAT if node_name(node) in self.full else self.low
            fixed = _FIXED_SLOTS.get(node.op_type, ())
            for slot, name in enumerate(node.input):
                if self.types.get(name) == FLOAT and name:
                    node.input[slot] = self._as(name, FLOAT if slot in fixed else kind)
                elif name in self.stored:
                    self.used.add(name)
            if node.op_type == "Cast" and self.types[node.output[0]] == FLOAT:
                for entry in node.attribute:
                    if entry.name == "to":
                        entry.i = kind
            self.nodes.append(node)
            for slot, name in enumerate(node.output):
                if self.types.get(name) != FLOAT:
                    continue
                self.have[name] = kind
                if name in outputs and kind != FLOAT:
                    inner = self.names.new(f"{name}:{_suffix(self.low)}")
                    node.output[slot] = inner
                    self.have[inner] = kind
                    self.cast[name, kind] = inner
                    self.have[name] = FLOAT
                    self._emit_cast(inner, name, FLOAT)
        self.graph.replace_nodes(self.nodes)
        kept = [tensor for tensor in self.graph.model.graph.initializer if tensor.name in self.used]
        del self.graph.model.graph.initializer[:]
        self.graph.model.graph.initializer.extend(kept)
        del self.graph.model.graph.value_info[:]

    def _as(self, name: str, kind: int) -> str:
        """A value equal to `name` with element type `kind`."""
        if name in self.stored:
            return self._constant(name, kind)
        if self.have[name] == kind:
            return name
        if (name, kind) not in self.cast:
            self.cast[name, kind] = self.names.new(f"{name}:{_suffix(kind)}")
            self._emit_cast(name, self.cast[name, kind], kind)
        return self.cast[name, kind]

    def _emit_cast(self, source: str, target: str, kind: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=kind))

    def _constant(self, name: str, kind: int) -> str:
        if kind == FLOAT:
            self.used.add(name)
            return name
        if (name, kind) not in self.cast:
            tensor = self.stored[name]
            new = TensorProto(name=self.names.new(f"{name}:{_suffix(kind)}"), data_type=kind, dims=tensor.dims)
            values = to_low(self.graph.array(tensor), kind)
            if values.nbytes < 1024:
                new.raw_data = values.tobytes()
            else:
                self.graph.new_weights[new.name] = values
            self.graph.model.graph.initializer.append(new)
            self.used.add(new.name)
            self.cast[name, kind] = new.name
        return self.cast[name, kind]


def to_low(array: npt.NDArray[Any], kind: int) -> npt.NDArray[Any]:
    """float32 `array` as float16, or as bfloat16 in the bits of a uint16; to the nearest, ties to even."""
    if kind == FLOAT16:
        return array.astype(np.float16)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)


def _suffix(kind: int) -> str:
    names: dict[int, str] = {FLOAT: "fp32", FLOAT16: "fp16", BFLOAT16: "bf16"}
    return names[kind]
