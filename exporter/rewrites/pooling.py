# SPDX-License-Identifier: Apache-2.0
"""Adaptive average pooling as two matrix products.

Identity. The average over rows [floor(i*h/s), ceil((i+1)*h/s)) and the columns alike is separable, so
pool(x) = A_h @ x @ A_w^T with A (s, size), whose row i holds 1/length on its span.

Why exact: it is the definition. A is exact for any size, while an exporter that lowers the pooling for one example size
writes a graph that is right at that size only: torch 2.13 does so for a dynamic size without a word. Hence this rewrite
is part of every dynamic export.

Cost, a 16 x 16 map of 512 channels and scales 1, 2, 3, 6: 0.5 M additions before, 2.0 M multiply-adds after, either way
nothing beside the network's 100 G; the map of 0.5 MB is read either way.
"""

from __future__ import annotations

from torch import Tensor, nn

from internimage_deploy.exporter.models import Segmentor
from internimage_deploy.exporter.options import ExportOptions
from internimage_deploy.exporter.rewrites.base import Rewrite
from internimage_deploy.exporter.rewrites.resampling import adaptive_average


class AdaptiveAverage(nn.Module):
    """`nn.AdaptiveAvgPool2d(scale)`: (N, C, h, w) to (N, C, scale, scale)."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return adaptive_average(height, self.scale, x) @ (x @ adaptive_average(width, self.scale, x).transpose(0, 1))


def pool_by_products(segmentor: Segmentor, options: ExportOptions) -> bool:
    """Replace every adaptive pooling."""
    found = False
    for parent in list(segmentor.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, AdaptiveAverage(_scale(child)))
                found = True
    return found


def _scale(pooling: nn.AdaptiveAvgPool2d) -> int:
    assert isinstance(pooling.output_size, int)
    return pooling.output_size


ADAPTIVE_POOLING = Rewrite(
    "adaptive-pooling", "adaptive average pooling as two matrix products", pool_by_products, needed_for_free_size=True
)
