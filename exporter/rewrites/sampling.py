# SPDX-License-Identifier: Apache-2.0
"""DCNv3's offsets and mask: one projection for both, offset_scale in its weights, softmax in the operator.

All three are local to a DCNv3 layer and independent of each other.

`offset-scale`. A point p of the kernel samples at base + (p + offset) * s, which equals base + (p + offset') with
offset' = s * offset + (s - 1) * p. The offsets are an affine map of the context: W' = s W, b' = s b + (s - 1) p.
Exact: the substitution is an equality. It removes the multiplication from the operator, 2 per point.

`mask-softmax`. The operator normalises the K mask logits of a point itself (`mask_softmax` in its contract). Exact: the
same softmax over the same K numbers. In standard operators nothing changes; the plugin saves one kernel, and a read and
a write of the mask, (N, H, W, G*K).

`offset-mask-gemm`. offset = W_o c + b_o and mask = W_m c + b_m read the same context: one product with the rows of both
below each other. Exact: each output is the same dot product. Multiply-adds stay; the context is read once instead of
twice, and 27 * G columns fill a matrix unit better than 18 * G and 9 * G.

Cost at 512x512, fp32, the 30 layers of InternImage-T: the projections take 3.40 G multiply-adds before and after.
offset-scale removes 13.0 M multiplications (in L and XL, whose scale is not 1), mask-softmax 52 MB of traffic where a
plugin computes the layer, and offset-mask-gemm 46 MB of reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internimage_deploy.exporter.models import DCNv3, Segmentor
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites.base import Rewrite, modules_of


def fold_offset_scale(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Give every DCNv3 layer an offset scale of 1."""
    found = False
    for layer in modules_of(segmentor, DCNv3):
        scale, offset = layer.offset_scale, layer.offset
        if scale == 1 or offset is None:
            continue
        moved = ((scale - 1) * _kernel_points(layer)).to(offset.bias)
        with torch.no_grad():
            offset.weight = nn.Parameter(scale * offset.weight, requires_grad=False)
            offset.bias = nn.Parameter(scale * offset.bias + moved.repeat(layer.group), requires_grad=False)
        layer.offset_scale = 1.0
        found = True
    return found


def fold_softmax_into_op(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Let the operator of every DCNv3 layer take mask logits."""
    for layer in modules_of(segmentor, DCNv3):
        layer.mask_softmax = True
    return True


def join_offset_and_mask(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Compute offsets and mask of every DCNv3 layer in one product."""
    for layer in modules_of(segmentor, DCNv3):
        if layer.offset is None or layer.mask is None:
            continue
        parts = (layer.offset, layer.mask)
        with torch.device("meta"):
            joint = nn.Linear(layer.channels, sum(part.out_features for part in parts))
        joint.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
        joint.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
        layer.offset_mask, layer.offset, layer.mask = joint, None, None
    return True


def _kernel_points(layer: DCNv3) -> Tensor:
    """(K*2,): pairs (x, y) of the kernel's own points in pixels, x outer, y inner."""
    (kernel_h, kernel_w), (dilation_h, dilation_w) = layer.kernel, layer.dilation
    x = torch.arange(kernel_w) * dilation_w - dilation_w * (kernel_w - 1) // 2
    y = torch.arange(kernel_h) * dilation_h - dilation_h * (kernel_h - 1) // 2
    return torch.cartesian_prod(x, y).flatten()


OFFSET_SCALE = Rewrite(
    "offset-scale", "offset_scale folded into the projection that computes the offsets", fold_offset_scale
)
MASK_SOFTMAX = Rewrite(
    "mask-softmax", "the softmax of the mask computed inside the DCNv3 operator", fold_softmax_into_op
)
OFFSET_MASK_GEMM = Rewrite("offset-mask-gemm", "offsets and mask computed by one matrix product", join_offset_and_mask)
