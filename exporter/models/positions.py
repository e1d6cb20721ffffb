# SPDX-License-Identifier: Apache-2.0
"""Positions of tokens: sine encodings, and the points around which deformable attention samples.

Source: DETR, https://arxiv.org/abs/2005.12872, with the normalisation that Mask2Former's configs ask for. Everything
here depends on sizes only, and is float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TEMPERATURE = 10_000
_EPS = 1e-6


def sine_encoding(length: int, channels: int, like: Tensor) -> Tensor:
    """The encoding of 1 to `length` along one axis: (length, channels), sines at even channels, cosines at odd ones."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    place = torch.arange(1, length + 1, device=like.device, dtype=dtype)
    place = place / (like.new_full((), length, dtype=dtype) + _EPS) * (2 * math.pi)
    exponent = 2 * (torch.arange(channels // 2, device=like.device, dtype=dtype)) / channels
    angle = place[:, None] / torch.pow(_TEMPERATURE, exponent)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


@dataclass(frozen=True)
class LevelPositions:
    """Positions on one map of `height` x `width` tokens.

    The encoding of a token is (row's, column's) + `embedding`, C channels of which the first half is the row's.
    """

    height: int
    width: int
    rows: Tensor  # (height, C/2)
    columns: Tensor  # (width, C/2)
    embedding: Tensor  # (C)

    def encoding(self) -> Tensor:
        """(height*width, C)."""
        rows = self.rows[:, None].expand(-1, self.width, -1)
        columns = self.columns[None].expand(self.height, -1, -1)
        return torch.cat((rows, columns), -1).flatten(0, 1) + self.embedding


def level_positions(height: int, width: int, embedding: Tensor) -> LevelPositions:
    """The positions on a map whose level has `embedding` (C)."""
    half = embedding.shape[0] // 2
    rows, columns = (sine_encoding(length, half, embedding) for length in (height, width))
    return LevelPositions(height, width, rows, columns, embedding)


class Positions:
    """Positions of the tokens of several levels, one level after another: T in all."""

    def __init__(self, levels: Sequence[LevelPositions]) -> None:
        self.levels = levels
        self._encoding: Tensor | None = None

    def encoding(self) -> Tensor:
        """(T, C)."""
        if self._encoding is None:
            self._encoding = torch.cat([level.encoding() for level in self.levels])
        return self._encoding

    def references(self, like: Tensor) -> Tensor:
        """The tokens' own places (T, 2): (x, y) of a pixel's centre, 0 to 1 across its map."""
        return torch.cat([_centres(level.height, level.width, like) for level in self.levels])


def _centres(height: int, width: int, like: Tensor) -> Tensor:
    """(height*width, 2)."""
    y, x = (
        (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / like.new_full((), length)
        for length in (height, width)
    )
    return torch.stack((x[None].expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1)
