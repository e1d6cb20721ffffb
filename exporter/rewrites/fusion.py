# SPDX-License-Identifier: Apache-2.0
"""Fusion convolutions at low resolution: UPerNet's fusion and its pyramid-pooling bottleneck.

Identity. The plain layer is conv3x3(concat(f0, up(f1), ...)). A convolution of a concatenation is the sum of the
convolutions of its parts, and a 3x3 convolution is a sum over its kernel points (dy, dx) of a 1x1 convolution
C[dy, dx] and a shift with zero padding. Bilinear upsampling and a shift act on rows and columns of every channel
alike, so they commute with the 1x1 convolutions, which act on channels:

    conv3x3(up(f)) = sum_dy R[dy] @ (sum_dx (C[dy, dx] f) @ W[dx])

where R[dy] (H, h) and W[dx] (w, W) are interpolation matrices shifted by the kernel point; a row that lies outside
the image is zero, which is the zero padding. So a map of h x w is mixed to 9 * O channels where it is small, and then
upsampled by two products with small matrices: `(H, 3h) @ (O, 3h, 3w) @ (3w, W)`.

Why exact: linearity only; nothing is approximated, whatever the sizes. The sums run in another order.

Cost, UPerNet fusion of InternImage-T at 512x512 (f0 is 128 x 128, all maps and the output have 512 channels), fp32:
154.6 G multiply-adds before; after, 38.7 G (f0) + 12.7 G (1x1) + 6.0 G (products) = 57.3 G, 37%. The concatenated
map of 134 MB is no longer written; the largest intermediate is f1's (9 * 512, 64, 64), 75 MB.
Pyramid pooling (16 x 16 map of 512 channels, pooled maps of 1, 2, 3, 6): 3.0 G before, 0.73 G after, and
2.6 MB of concatenated map become 0.9 MB of products' inputs.
The weights are the same numbers in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.models.heads import FusionModule, UPerHead
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites.base import Rewrite
from internimage_deploy.exporter.rewrites.resampling import shifted_interpolation


class UpsampledConv(nn.Module):
    """conv3x3(up(x)) without its bias: (N, C, h, w) to (N, O, H, W), mixed at (h, w)."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` (O, C, 3, 3)."""
        super().__init__()
        out_channels, in_channels = weight.shape[:2]
        self.mix = nn.Conv2d(in_channels, 9 * out_channels, 1, bias=False, device="meta")
        points = weight.detach().permute(0, 2, 3, 1).reshape(9 * out_channels, in_channels, 1, 1)
        self.mix.weight = nn.Parameter(points.contiguous(), requires_grad=False)
        self.out_channels = out_channels

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        n, _, h, w = x.shape
        rows = shifted_interpolation(h, height, x).transpose(0, 1).reshape(height, 3 * h)
        columns = shifted_interpolation(w, width, x).transpose(1, 2).reshape(3 * w, width)
        points = self.mix(x).view(n, self.out_channels, 3, 3, h, w)
        points = points.transpose(3, 4).reshape(n, self.out_channels, 3 * h, 3 * w)
        return rows @ (points @ columns)


class LowResolutionFusion(nn.Module):
    """A 3x3 `FusionModule` whose maps, all but the first, stay at their own sizes; same call, same output."""

    def __init__(self, plain: FusionModule, widths: Sequence[int]) -> None:
        """`widths` are the channels of the maps."""
        super().__init__()
        first, *others = plain.conv.weight.detach().split(list(widths), dim=1)
        self.conv = nn.Conv2d(widths[0], first.shape[0], 3, padding=1, bias=plain.conv.bias is not None, device="meta")
        self.conv.weight = nn.Parameter(first.contiguous(), requires_grad=False)
        self.conv.bias = plain.conv.bias
        self.others = nn.ModuleList(UpsampledConv(weight) for weight in others)
        self.bn, self.activate = plain.bn, plain.activate

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        y = self.conv(maps[0])
        height, width = maps[0].shape[2:]
        for conv, x in zip(self.others, maps[1:], strict=True):
            y = y + conv(x, height, width)
        return self.activate(self.bn(y))


def fuse_upernet(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Rewrite UPerHead's fusion convolution."""
    head = segmentor.decode_head
    if not isinstance(head, UPerHead):
        return False
    channels = segmentor.config.head.channels
    widths = [channels] * (head.fpn_bottleneck.conv.in_channels // channels)
    head.add_module("fpn_bottleneck", LowResolutionFusion(head.fpn_bottleneck, widths))
    return True


def fuse_pyramid_pooling(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Rewrite the convolution over UPerHead's pooled maps."""
    head = segmentor.decode_head
    if not isinstance(head, UPerHead):
        return False
    channels = segmentor.config.head.channels
    pooled = [channels] * len(head.psp_modules)
    widths = [head.bottleneck.conv.in_channels - sum(pooled), *pooled]
    head.add_module("bottleneck", LowResolutionFusion(head.bottleneck, widths))
    return True


UPERNET_FUSION = Rewrite(
    "upernet-fusion", "UPerNet's fusion convolution applied to each map before its upsampling", fuse_upernet
)
PYRAMID_POOLING = Rewrite(
    "pyramid-pooling", "the convolution over the pooled maps applied before their upsampling", fuse_pyramid_pooling
)
