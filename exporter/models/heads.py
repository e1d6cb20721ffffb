# SPDX-License-Identifier: Apache-2.0
"""The two decode heads of the released models, inference only, with the parameter names of mmsegmentation.

Sources: UPerNet, https://arxiv.org/abs/1807.10221; SegFormer, https://arxiv.org/abs/2105.15203.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage_deploy.exporter.models.config import HeadConfig
from internimage_deploy.exporter.models.layers import ConvBlock, ConvModule


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """Bilinear, half-pixel centres: (N, C, h, w) to the height and width of `reference` (N, C', H, W)."""
    return F.interpolate(x, size=reference.shape[2:], mode="bilinear", align_corners=False)


class FusionModule(ConvBlock):
    """A convolution over maps of different sizes: upsampled to the first one's size, concatenated, convolved.

    [(N, C_i, h_i, w_i), ...] to (N, out, h_0, w_0), sum of C_i = in.
    """

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.convolve(torch.cat([maps[0], *(resize_like(x, maps[0]) for x in maps[1:])], dim=1))


class UPerHead(nn.Module):
    """Pyramid pooling on the last map, a top-down feature pyramid, one fusion convolution.

    Four maps (N, in_channels[i], H / 2**i, W / 2**i) to logits (N, classes, H, W).
    """

    def __init__(self, in_channels: Sequence[int], config: HeadConfig) -> None:
        super().__init__()
        channels = config.channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(in_channels[-1], channels, 1))
            for scale in config.pool_scales
        )
        self.bottleneck = FusionModule(in_channels[-1] + len(config.pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1) for c in in_channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in in_channels[:-1])
        self.fpn_bottleneck = FusionModule(len(in_channels) * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, config.num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.conv_seg(self.fpn_bottleneck(self.pyramid(features)))

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The maps that the fusion convolution reads: (N, channels, H / 2**i, W / 2**i)."""
        maps = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=False)]
        last = features[-1]
        maps.append(self.bottleneck([last, *(module(last) for module in self.psp_modules)]))
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + resize_like(maps[i], maps[i - 1])
        return [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=False)] + maps[-1:]


class SegformerHead(nn.Module):
    """A 1x1 convolution per map, upsampling, a 1x1 fusion.

    Four maps (N, in_channels[i], H / 2**i, W / 2**i) to logits (N, classes, H, W).
    """

    def __init__(self, in_channels: Sequence[int], config: HeadConfig) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvModule(c, config.channels, 1) for c in in_channels)
        self.fusion_conv = FusionModule(config.channels * len(in_channels), config.channels, 1)
        self.conv_seg = nn.Conv2d(config.channels, config.num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.conv_seg(self.fusion_conv([conv(x) for conv, x in zip(self.convs, features, strict=True)]))
