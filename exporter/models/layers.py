# SPDX-License-Identifier: Apache-2.0
"""Small layers shared by the backbone and the heads."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from internimage_deploy.exporter.models.config import Norm
from internimage_deploy.exporter.options import Activation

Layout = Literal["channels_first", "channels_last"]

LAYER_NORM_EPS = 1e-6


class ToChannelsFirst(nn.Module):
    """(N, H, W, C) to (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class ToChannelsLast(nn.Module):
    """(N, C, H, W) to (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def norm(
    channels: int, kind: Norm, source: Layout = "channels_last", target: Layout = "channels_last"
) -> nn.Sequential:
    """A normalisation with the layout changes around it.

    Layout changes count as entries of the Sequential because the official state dict's keys count them
    ("norm1.1.weight").
    """
    works_in: Layout = "channels_last" if kind == "LN" else "channels_first"
    layers: list[nn.Module] = []
    if source != works_in:
        layers.append(_change(works_in))
    layers.append(nn.LayerNorm(channels, eps=LAYER_NORM_EPS) if kind == "LN" else nn.BatchNorm2d(channels))
    if target != works_in:
        layers.append(_change(target))
    return nn.Sequential(*layers)


def activation(name: Activation) -> nn.Module:
    """The activation layer of that name; GELU is the erf form, GELU_tanh its approximation."""
    layers: dict[Activation, nn.Module] = {
        "GELU": nn.GELU(),
        "GELU_tanh": nn.GELU(approximate="tanh"),
        "ReLU": nn.ReLU(),
        "SiLU": nn.SiLU(),
    }
    return layers[name]


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, ReLU, for modules that differ in what they take."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.activate = nn.ReLU()

    def convolve(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H, W)."""
        return self.activate(self.bn(self.conv(x)))


class ConvModule(ConvBlock):
    """Convolution without bias, batch norm, ReLU: (N, in, H, W) to (N, out, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x)


def _change(to: Layout) -> nn.Module:
    return ToChannelsLast() if to == "channels_last" else ToChannelsFirst()
