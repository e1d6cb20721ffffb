# SPDX-License-Identifier: Apache-2.0
"""The node `internimage::DCNv3` that a DCNv3 layer becomes while a model is traced."""

from __future__ import annotations

from collections.abc import Sequence

import torch.onnx
from torch import Tensor, nn

from internimage_deploy.exporter.models.dcnv3 import DCNv3, Pair
from internimage_deploy.operators import contract

# What torch.onnx.ops.symbolic takes as an attribute.
Value = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]


def dcnv3_node(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    kernel: Pair = 3,
    stride: Pair = 1,
    pad: Pair = 1,
    dilation: Pair = 1,
    group: int,
    offset_scale: float = 1.0,
    mask_softmax: bool = False,
) -> Tensor:
    """The signature and shapes of `models.dcnv3.dcnv3`; emits the node instead of computing anything."""
    values: dict[str, int | float] = {}
    for name, pair in (("kernel", kernel), ("stride", stride), ("pad", pad), ("dilation", dilation)):
        values[f"{name}_h"], values[f"{name}_w"] = pair if isinstance(pair, tuple) else (pair, pair)
    channels = input.shape[3]
    values |= {
        "group": group,
        "group_channels": channels // group,
        "offset_scale": offset_scale,
        "mask_softmax": mask_softmax,
    }
    attributes: dict[str, Value] = {
        a.name: (int if a.type == "int" else float)(values[a.name]) for a in contract.ATTRIBUTES
    }
    return torch.onnx.ops.symbolic(
        f"{contract.DOMAIN}::{contract.OP_TYPE}",
        (input, offset, mask),
        attributes,
        dtype=input.dtype,
        shape=(*offset.shape[:3], channels),
        version=contract.OPSET_VERSION,
    )


def emit_nodes(module: nn.Module) -> None:
    """Let every `DCNv3` layer inside `module` emit the node; it can no longer be run in PyTorch afterwards."""
    for layer in module.modules():
        if isinstance(layer, DCNv3):
            layer.operator = dcnv3_node
