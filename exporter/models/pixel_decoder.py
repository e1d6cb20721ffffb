# SPDX-License-Identifier: Apache-2.0
"""Mask2Former's pixel decoder: deformable attention across the backbone's maps, then one fine map for the masks.

Sources: Mask2Former, https://arxiv.org/abs/2112.01527; Deformable DETR, https://arxiv.org/abs/2010.04159. Parameter
names are those of the official checkpoints. Inference only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from internimage_deploy.exporter.models.config import Mask2FormerConfig
from internimage_deploy.exporter.models.heads import resize_like
from internimage_deploy.exporter.models.ms_deform_attn import MSDeformAttention
from internimage_deploy.exporter.models.positions import LevelPositions, Positions, level_positions


class GroupNormConv(nn.Module):
    """Convolution and group norm: (N, in, H, W) to (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.gn = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.gn(self.conv(x))


class FeedForward(nn.Module):
    """Two linear layers with a residual: (..., C) to (..., C)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(channels, hidden), nn.ReLU()),
            nn.Linear(hidden, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a norm after it: (N, T, C) to (N, T, C)."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        channels = config.channels
        attention = MSDeformAttention(channels, config.encoder_heads, config.levels, config.points)
        self.attentions = nn.ModuleList([attention])
        self.ffns = nn.ModuleList([FeedForward(channels, config.encoder_feedforward)])
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        x = self.norms[0](x + self.attentions[0](x, positions))
        return self.norms[1](self.ffns[0](x))


class Encoder(nn.Module):
    """Encoder layers in sequence."""

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions)
        return x


class PixelDecoder(nn.Module):
    """Four backbone maps (N, C_i, H / 2**i, W / 2**i) to memories and mask features.

    Levels count from the coarsest map up. With as many levels as maps the mask features are read from the finest level;
    with one level less, from a map of stride 4, made of the finest memory and the backbone's first map.
    """

    def __init__(self, in_channels: Sequence[int], config: Mask2FormerConfig) -> None:
        super().__init__()
        channels, groups, levels = config.channels, config.norm_groups, config.levels
        self.input_convs = nn.ModuleList(
            GroupNormConv(in_channels[-1 - level], channels, 1, groups, bias=True) for level in range(levels)
        )
        self.level_encoding = nn.Embedding(levels, channels)
        self.encoder = Encoder(config)
        fine = range(len(in_channels) - levels)
        self.lateral_convs = nn.ModuleList(GroupNormConv(in_channels[i], channels, 1, groups, bias=False) for i in fine)
        self.output_convs = nn.ModuleList(GroupNormConv(channels, channels, 3, groups, bias=False) for _ in fine)
        self.fine_map: nn.Module | None = None  # what a rewrite computes the map of stride 4 with
        self.mask_feature: nn.Module = nn.Conv2d(channels, config.mask_channels, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[LevelPositions], Tensor]:
        """Memories (N, T_l, C) and positions of the levels, and the mask features (N, mask channels, H/4, W/4)."""
        maps = [conv(feature) for conv, feature in zip(self.input_convs, reversed(features), strict=False)]
        levels = [
            level_positions(x.shape[2], x.shape[3], self.level_encoding.weight[level]) for level, x in enumerate(maps)
        ]
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        tokens = self.encoder(tokens, Positions(levels))
        memories = list(tokens.split([level.height * level.width for level in levels], 1))
        finest = memories[-1].transpose(1, 2).unflatten(2, (levels[-1].height, levels[-1].width))
        return memories, levels, self.mask_feature(self._fine(features[0], finest))

    def _fine(self, feature: Tensor, finest: Tensor) -> Tensor:
        """The map that the mask features are read from, (N, C, H/4, W/4)."""
        if self.fine_map is not None:
            return self.fine_map(feature, finest)
        if not self.lateral_convs:
            return finest
        y = self.lateral_convs[0](feature)
        return self.output_convs[0](y + resize_like(finest, y)).relu()
