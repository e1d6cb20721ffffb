# SPDX-License-Identifier: Apache-2.0
"""The nodes `internimage::DCNv3` and `internimage::MSDeformAttn` that layers become while a model is traced."""

from __future__ import annotations

from collections.abc import Sequence

import torch.onnx
from torch import Tensor, nn

from internimage_deploy.exporter.models.dcnv3 import DCNv3, Pair
from internimage_deploy.exporter.models.ms_deform_attn import MSDeformAttention
from internimage_deploy.operators import contract, ms_deform_attn

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


def ms_deform_attn_node(
    value: Tensor, sizes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The signature and shapes of `models.ms_deform_attn`; emits the node instead of computing anything."""
    starts, end = [], 0
    for height, width in sizes:
        starts.append(end)
        end = end + height * width
    shapes = torch.stack([_integers(size) for size in sizes])
    batch, _, heads, channels = value.shape
    return torch.onnx.ops.symbolic(
        f"{contract.DOMAIN}::{ms_deform_attn.OP_TYPE}",
        (value, shapes, _integers(starts), sampling_locations, attention_weights),
        dtype=value.dtype,
        shape=(batch, sampling_locations.shape[1], heads * channels),
        version=contract.OPSET_VERSION,
    )


def _integers(values: Sequence[int]) -> Tensor:
    """An int64 vector of numbers, each of which may be a free size."""
    return torch.stack([torch.full((), value, dtype=torch.int64) for value in values])


def emit_nodes(module: nn.Module) -> None:
    """Let every `DCNv3` and `MSDeformAttention` layer inside `module` emit its node.

    The module can no longer be run in PyTorch afterwards.
    """
    for layer in module.modules():
        if isinstance(layer, DCNv3):
            layer.operator = dcnv3_node
        elif isinstance(layer, MSDeformAttention):
            layer.operator = ms_deform_attn_node
