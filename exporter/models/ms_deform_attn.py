# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention in plain PyTorch: the operator, and the layer that computes what it samples.

Source: Deformable DETR, https://arxiv.org/abs/2010.04159. `internimage_deploy.operators.ms_deform_attn` states the
operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage_deploy.exporter.models.positions import Positions

Size = tuple[int, int]


def ms_deform_attn(
    value: Tensor, sizes: Sequence[Size], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention, forward; differentiable.

    Args:
        value: (N, T, M, D), M heads of D channels; T = sum of height * width, levels one after another, row by row.
        sizes: (height, width) of each of the L levels.
        sampling_locations: (N, Q, M, L, P, 2), (x, y) from 0 to 1 across the level's map.
        attention_weights: (N, Q, M, L, P), softmaxed over levels and points.

    Returns:
        (N, Q, M*D) in the dtype of `value`. Coordinates, weights and sums are float32 (float64 for float64).
    """
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    grid = (2 * sampling_locations.to(dtype) - 1).permute(0, 2, 3, 1, 4, 5)
    weights = attention_weights.to(dtype).permute(0, 2, 3, 1, 4)
    output = value.new_zeros((), dtype=dtype)
    start = 0
    for level, (height, width) in enumerate(sizes):
        tokens = value[:, start : start + height * width].to(dtype)
        start = start + height * width
        maps = tokens.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        samples = F.grid_sample(
            maps, grid[:, :, level].flatten(0, 1), mode="bilinear", padding_mode="zeros", align_corners=False
        )
        output = output + (samples * weights[:, :, level].flatten(0, 1)[:, None]).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


class MSDeformAttention(nn.Module):
    """Self-attention of tokens over all levels: (N, T, C) to (N, T, C).

    `operator` is what computes the attention: `ms_deform_attn`, or whatever stands for it in an export.
    """

    operator: Callable[..., Tensor]

    def __init__(self, channels: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.operator = ms_deform_attn
        self.sampling_offsets: nn.Linear | None = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights: nn.Linear | None = nn.Linear(channels, heads * levels * points)
        self.sampling: nn.Linear | None = None  # both in one, when a rewrite has joined them
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """(N, T, C) to (N, T, C); `positions` are those of the tokens."""
        offsets, weights = self._offsets_and_weights(x, positions)
        offsets = offsets.unflatten(-1, (self.heads, self.levels, self.points, 2))
        offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))
        weights = weights.unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, (self.levels, self.points))
        # An offset counts pixels of the level that is sampled.
        pixel = torch.stack([_pixel(level.height, level.width, offsets) for level in positions.levels])
        locations = positions.references(offsets)[:, None, None, None] + offsets * pixel[:, None]
        value = self.value_proj(x).unflatten(-1, (self.heads, -1))
        sizes = [(level.height, level.width) for level in positions.levels]
        return self.output_proj(self.operator(value, sizes, locations, weights))

    def _offsets_and_weights(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """(N, T, M*L*P*2) in pixels, and (N, T, M*L*P) logits."""
        query = x + positions.encoding()
        if self.sampling is not None:
            both = self.sampling(query)
            third = both.shape[-1] // 3
            return both[..., : 2 * third], both[..., 2 * third :]
        assert self.sampling_offsets is not None
        assert self.attention_weights is not None
        return self.sampling_offsets(query), self.attention_weights(query)


def _pixel(height: int, width: int, like: Tensor) -> Tensor:
    """(2,): the size (x, y) of a pixel where the map has size 1."""
    return torch.stack([1 / like.new_full((), width), 1 / like.new_full((), height)])
