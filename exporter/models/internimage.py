# SPDX-License-Identifier: Apache-2.0
"""The InternImage backbone, inference only.

Source: https://arxiv.org/abs/2211.05778; parameter names are those of the official checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internimage_deploy.exporter.models.config import BackboneConfig, Norm
from internimage_deploy.exporter.models.dcnv3 import DCNv3
from internimage_deploy.exporter.models.layers import activation, norm
from internimage_deploy.exporter.options import Activation


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: (N, 3, H, W) to (N, H/4, W/4, C)."""

    def __init__(self, channels: int, norm_layer: Norm, act_layer: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = norm(channels // 2, norm_layer, "channels_first", "channels_first")
        self.act = activation(act_layer)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = norm(channels, norm_layer, "channels_first", "channels_last")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """3x3 convolution of stride 2: (N, H, W, C) to (N, H/2, W/2, 2C)."""

    def __init__(self, channels: int, norm_layer: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = norm(2 * channels, norm_layer, "channels_first", "channels_last")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class MLP(nn.Module):
    """Two linear layers: (..., C) to (..., C)."""

    def __init__(self, channels: int, hidden: int, act_layer: Activation) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.act = activation(act_layer)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """DCNv3 and an MLP, each with a residual: (N, H, W, C) to (N, H, W, C).

    Where the norms stand depends on the variant: before each part (T), after it (S, B, L, XL, G), or both (H).
    Layer scale leaves the second norm of the "both" form out, as the official code does.
    """

    def __init__(self, channels: int, group: int, config: BackboneConfig) -> None:
        super().__init__()
        self.pre_norm = not config.post_norm
        self.res_norm = config.res_post_norm and not config.post_norm and not config.layer_scale
        self.layer_scale = config.layer_scale
        self.norm1 = norm(channels, "LN")
        self.dcn = DCNv3(
            channels,
            group,
            dw_kernel_size=config.dw_kernel_size,
            offset_scale=config.offset_scale,
            center_feature_scale=config.center_feature_scale,
            norm_layer=config.norm_layer,
            act_layer=config.act_layer,
        )
        self.norm2 = norm(channels, "LN")
        self.mlp = MLP(channels, int(channels * config.mlp_ratio), config.act_layer)
        if config.layer_scale:
            self.gamma1 = nn.Parameter(torch.ones(channels))
            self.gamma2 = nn.Parameter(torch.ones(channels))
        if config.res_post_norm:
            self.res_post_norm1 = norm(channels, "LN")
            self.res_post_norm2 = norm(channels, "LN")

    def forward(self, x: Tensor) -> Tensor:
        y = self.dcn(self.norm1(x)) if self.pre_norm else self.norm1(self.dcn(x))
        if self.res_norm:
            y = self.res_post_norm1(y)
        x = x + (self.gamma1 * y if self.layer_scale else y)
        y = self.mlp(self.norm2(x)) if self.pre_norm else self.norm2(self.mlp(x))
        if self.res_norm:
            y = self.res_post_norm2(y)
        return x + (self.gamma2 * y if self.layer_scale else y)


class Level(nn.Module):
    """One resolution: blocks, a closing norm, and the way down to the next level."""

    def __init__(self, index: int, config: BackboneConfig) -> None:
        super().__init__()
        channels = config.channels * 2**index
        self.blocks = nn.ModuleList(Block(channels, config.groups[index], config) for _ in range(config.depths[index]))
        self.post_norm_block_ids = config.level2_post_norm_block_ids if index == 2 else ()
        if self.post_norm_block_ids:
            self.post_norms = nn.ModuleList(norm(channels, "LN") for _ in self.post_norm_block_ids)
        self.norm = norm(channels, "LN") if not config.post_norm or config.center_feature_scale else None
        last = index == len(config.depths) - 1
        self.downsample = None if last else Downsample(channels, config.norm_layer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, H, W, C) to this level's features (N, H, W, C), and what the next level reads, (N, H/2, W/2, 2C)."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.post_norm_block_ids:
                x = self.post_norms[self.post_norm_block_ids.index(index)](x)
        if self.norm is not None:
            x = self.norm(x)
        return x, x if self.downsample is None else self.downsample(x)


class InternImage(nn.Module):
    """(N, 3, H, W), normalised, H and W multiples of 32, to four maps (N, C * 2**i, H / 2**(i+2), W / 2**(i+2))."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.patch_embed = Stem(config.channels, config.norm_layer, config.act_layer)
        self.levels = nn.ModuleList(Level(index, config) for index in range(len(config.depths)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.patch_embed(x)
        features = []
        for level in self.levels:
            here, x = level(x)
            features.append(here.permute(0, 3, 1, 2).contiguous())
        return features
