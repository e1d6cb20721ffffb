# SPDX-License-Identifier: Apache-2.0
"""The ONNX operators that each parser reads, and a check of a graph against them.

TensorRT's rows are the importers of onnx-tensorrt's branches 8.5-GA to 10.1-GA; from 10.1 on nothing that an exported
model uses was removed. TensorRT-RTX's row is what its parser's `supports_operator` returns (1.7.1). TensorRT-RTX ends
the process at an operator it does not know, so nothing unknown may ever reach it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import operators
from internimage_deploy.runtime.engine.engine_backend import DISPLAY_NAMES, EngineBackend
from internimage_deploy.runtime.engine.plugin_nodes import PLUGIN_OPERATORS

_SINCE_8_5 = (
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip "
    "Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout "
    "Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool "
    "GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Identity If "
    "InstanceNormalization IsNaN LRN LSTM LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul "
    "Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow "
    "QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 "
    "ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
    "Reshape Resize ReverseSequence RoiAlign Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin "
    "Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile "
    "TopK Transpose Trilu Unsqueeze Upsample Where Xor"
)
# Operator -> first version of TensorRT whose parser reads it.
TENSORRT_SINCE: dict[str, tuple[int, int]] = {
    **dict.fromkeys(_SINCE_8_5.split(), (8, 5)),
    **dict.fromkeys(("GroupNormalization", "IsInf", "LayerNormalization"), (8, 6)),
    **dict.fromkeys(("CastLike", "Hardmax"), (9, 1)),
    **dict.fromkeys(("Gelu", "Mish"), (10, 0)),
}
RTX_OPERATORS = frozenset(TENSORRT_SINCE)

# Newest opset each parser was written for; a newer operator version is rewritten or refused.
NEWEST_OPSET: dict[tuple[int, int], int] = {(8, 5): 17, (8, 6): 17, (9, 1): 19, (10, 0): 20, (10, 3): 22}
RTX_NEWEST_OPSET = 22

OLDEST_TENSORRT = (8, 5)


@dataclass(frozen=True)
class Parser:
    """The ONNX parser that comes with a version of a compiler."""

    backend: EngineBackend
    version: tuple[int, int]

    def reads(self, op_type: str) -> bool:
        """True when the parser has an importer for a standard operator."""
        if self.backend == "tensorrt-rtx":
            return op_type in RTX_OPERATORS
        return TENSORRT_SINCE.get(op_type, (99, 0)) <= self.version

    @property
    def newest_opset(self) -> int:
        """The newest opset the parser was written for."""
        if self.backend == "tensorrt-rtx":
            return RTX_NEWEST_OPSET
        return max(opset for since, opset in NEWEST_OPSET.items() if since <= max(self.version, OLDEST_TENSORRT))

    @property
    def reads_parts_of_shapes(self) -> bool:
        """True when `start` and `end` of Shape count: TensorRT's parsers before 10.0 return the whole shape."""
        return self.backend == "tensorrt-rtx" or self.version >= (10, 0)

    @property
    def strongly_typed(self) -> bool:
        """True when the compiler can take element types from the graph."""
        return self.backend == "tensorrt-rtx" or self.version >= (9, 1)

    @property
    def can_share_profiles(self) -> bool:
        """True when an engine's execution contexts may use one profile at a time, perhaps by a preview feature."""
        return self.backend == "tensorrt-rtx" or self.version >= (8, 6)

    @property
    def bfloat16(self) -> bool:
        """True when the compiler knows bfloat16."""
        return self.backend == "tensorrt-rtx" or self.version >= (9, 1)

    def __str__(self) -> str:
        return f"{DISPLAY_NAMES[self.backend]} {self.version[0]}.{self.version[1]}"


def parser_of(backend: EngineBackend, version: str) -> Parser:
    """The parser that comes with a compiler, from its version text.

    Raises:
        UserError: a TensorRT older than 8.5.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if backend == "tensorrt" and (major, minor) < OLDEST_TENSORRT:
        raise UserError(
            f"TensorRT {version} is too old, 8.5 or later is needed; on a Jetson install JetPack 5.1 or later"
        )
    return Parser(backend, (major, minor))


def check(model: onnx.ModelProto, parser: Parser) -> None:
    """Check that `parser` can read every node of `model`.

    Raises:
        UserError: it cannot; the message names the first such node and what could help.
    """
    functions = {(function.domain, function.name) for function in model.functions}
    for domain, op_type, name in operators(model):
        if (domain, op_type) in functions:
            continue
        if domain in ("", "ai.onnx") and parser.reads(op_type):
            continue
        plugin = (domain, op_type) in PLUGIN_OPERATORS
        if plugin and parser.backend == "tensorrt":
            continue
        if plugin:
            raise UserError(
                f"node {name}: {op_type} has no function in this file and {parser} takes no plugins; "
                "export the checkpoint again with export-onnx, which includes the function"
            )
        since = TENSORRT_SINCE.get(op_type) if domain in ("", "ai.onnx") else None
        advice = f"TensorRT {since[0]}.{since[1]} or later reads it" if since else "export the model without it"
        full_name = f"{domain}::{op_type}" if domain else op_type
        raise UserError(f"node {name}: {parser} cannot read the operator {full_name}; {advice}")
