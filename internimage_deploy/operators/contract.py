# SPDX-License-Identifier: Apache-2.0
"""The contract of the DCNv3 operator.

The exporter's node, the ONNX function body, the TensorRT plugin and the README are each checked against this table.

Inputs, all of one dtype (float32, float16 or bfloat16), K = kernel_h * kernel_w:

    input   (N, H, W, G*C)
    offset  (N, Ho, Wo, G*K*2)   pairs (x, y), in pixels
    mask    (N, Ho, Wo, G*K)     weights, already softmaxed over K; logits when mask_softmax = 1

Output: (N, Ho, Wo, G*C).

For group g, channel c and output position (ho, wo), with x outer and y inner (k = kx * kernel_h + ky):

    y = ho*stride_h - pad_h + r_h + (ky*dilation_h - r_h + offset[..., 2k+1]) * offset_scale
    x = wo*stride_w - pad_w + r_w + (kx*dilation_w - r_w + offset[..., 2k  ]) * offset_scale
    r_h = dilation_h*(kernel_h-1) // 2,  r_w = dilation_w*(kernel_w-1) // 2
    out = sum_k mask[..., k] * bilinear(input[..., g*C + c], y, x)

Bilinear sampling reads zero outside the input. Coordinates, weights and sums are float32 whatever the dtype.

`DCNv3Packed` is the same operator, for TensorRT's plugin alone, with offsets and mask in one input
`offset_mask` (N, Ho, Wo, G*K*3), offsets first: what one matrix product computes, taken as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DOMAIN = "internimage"
OP_TYPE = "DCNv3"
PACKED_OP_TYPE = "DCNv3Packed"
OPSET_VERSION = 1
OFFICIAL_DOMAIN = "mmdeploy"
OFFICIAL_OP_TYPE = "TRTDCNv3"
PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""

INPUTS = ("input", "offset", "mask")
PACKED_INPUTS = ("input", "offset_mask")
OUTPUTS = ("output",)
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Attribute:
    """One attribute of the node. Without a `default` the node must have it; `minimum` is inclusive."""

    name: str
    type: Literal["int", "float"]
    default: int | float | None
    minimum: int | float | None
    maximum: int | float | None = None


ATTRIBUTES = (
    Attribute("kernel_h", "int", 3, 1),
    Attribute("kernel_w", "int", 3, 1),
    Attribute("stride_h", "int", 1, 1),
    Attribute("stride_w", "int", 1, 1),
    Attribute("pad_h", "int", 1, 0),
    Attribute("pad_w", "int", 1, 0),
    Attribute("dilation_h", "int", 1, 1),
    Attribute("dilation_w", "int", 1, 1),
    Attribute("group", "int", None, 1),
    Attribute("group_channels", "int", None, 1),
    Attribute("offset_scale", "float", 1.0, None),
    Attribute("mask_softmax", "int", 0, 0, 1),
)
# allow_half is the plugin's alone: float16 kernels may interpolate in float16. Sums over points stay float32.
PLUGIN_ATTRIBUTES = (*ATTRIBUTES, Attribute("allow_half", "int", 0, 0, 1))


def output_size(size: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """Output height or width for an input height or width, in pixels."""
    return (size + 2 * pad - (dilation * (kernel - 1) + 1)) // stride + 1
