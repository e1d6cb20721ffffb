# SPDX-License-Identifier: Apache-2.0
"""Resampling as matrix products: the small matrices that the rewrites multiply by.

Interpolation and pooling along one axis are linear, so each is a matrix (target, source) that depends on the two sizes
only. Sizes known while the graph is traced make it a constant of the graph; symbolic ones make it a handful of
elementwise operators on an arange. Both go through the same formulas, in float32 or wider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolation(source: int, target: int, like: Tensor) -> Tensor:
    """Bilinear interpolation with half-pixel centres along one axis: (target, source), dtype and device of `like`.

    Row i holds the weights of output i: a hat of width 1 around the source position (i + 0.5) * source / target - 0.5,
    which is clamped to the outermost pixels. Equals `F.interpolate(..., align_corners=False)`.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    position = (torch.arange(target, device=like.device, dtype=dtype) + 0.5) * (source / target) - 0.5
    last = torch.full((), source - 1, device=like.device, dtype=dtype)  # a tensor, so that a symbolic size stays one
    position = position.clamp(min=0).minimum(last)
    pixel = torch.arange(source, device=like.device, dtype=dtype)
    return F.relu(1 - (position[:, None] - pixel).abs()).to(like.dtype)


def shifted_interpolation(source: int, target: int, like: Tensor) -> Tensor:
    """Interpolation as seen by the three points of a zero-padded 3-wide kernel: (3, target, source).

    Entry d is `interpolation` moved by d - 1 rows. Rows that would lie outside are zero: the kernel's zero padding.
    """
    matrix, outside = interpolation(source, target, like), like.new_zeros(1, source)
    padded = torch.cat((outside, matrix, outside))
    return torch.stack((padded[:-2], padded[1:-1], padded[2:]))


def adaptive_average(source: int, target: int, like: Tensor) -> Tensor:
    """Adaptive average pooling along one axis: (target, source), dtype and device of `like`.

    Row i averages the pixels floor(i * source / target) to ceil((i + 1) * source / target), exclusively.
    """
    # Pixel p belongs to cell i when floor(i * source / target) <= p < ceil((i + 1) * source / target). Multiplied out,
    # both are comparisons of integers, which neither round nor divide.
    start = (torch.arange(target, device=like.device) * source)[:, None]
    pixel = torch.arange(source, device=like.device) * target
    inside = ((pixel + target > start) & (pixel < start + source)).to(torch.promote_types(like.dtype, torch.float32))
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)
