# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn for the benchmarks; see plugin_operators.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from plugin_operators import SCALAR_BYTES, Operands, numeric_difference
from prediction import Work

from internimage_deploy.trt_plugins.host_operators import MS_DEFORM_ATTN, MsDeformAttnParams, MsDeformAttnVariant

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MsDeformAttnCase:
    """One call of MSDeformAttn over maps of `sizes` (h, w); `wild` locations are infinite or NaN and read zero."""

    label: str
    batch: int
    sizes: tuple[tuple[int, int], ...]
    queries: int
    heads: int
    channels: int
    points: int = 4
    wild: bool = False

    @property
    def keys(self) -> int:
        """Cells of all maps together."""
        return sum(height * width for height, width in self.sizes)


def _decoder_case(batch: int, heads: int) -> MsDeformAttnCase:
    """A layer of Mask2Former's pixel decoder for images of 512x512: every cell of three maps is a query."""
    sizes = ((16, 16), (32, 32), (64, 64))
    cells = sum(height * width for height, width in sizes)
    return MsDeformAttnCase(f"Mask2Former 512x512 {heads} heads b{batch}", batch, sizes, cells, heads, 32)


class MsDeformAttn:
    """`Operator` of kernel/ms_deform_attn_*."""

    host = MS_DEFORM_ATTN
    name = host.prefix

    def odd_cases(self) -> Sequence[MsDeformAttnCase]:
        widths = [
            MsDeformAttnCase(f"D{channels} P{points}", 2, ((2, 3), (4, 6), (8, 12)), 31, 3, channels, points)
            for channels in (32, 16, 24, 12, 6, 5)
            for points in (4, 3)
        ]
        return [
            *widths,
            MsDeformAttnCase("one cell", 1, ((1, 1),), 1, 1, 32),
            MsDeformAttnCase("wild locations", 2, ((5, 7), (3, 4)), 40, 2, 32, wild=True),
            MsDeformAttnCase("wild locations, D5", 1, ((5, 7),), 40, 2, 5, wild=True),
        ]

    def network_cases(self) -> Sequence[MsDeformAttnCase]:
        return [_decoder_case(batch, heads) for heads in (32, 8) for batch in (1, 8)]

    def small(self, case: MsDeformAttnCase) -> MsDeformAttnCase:
        return replace(case, batch=1, sizes=((2, 3),) * len(case.sizes), queries=5)

    def draw(self, case: MsDeformAttnCase, dtype: str, device: str, seed: int) -> dict[str, torch.Tensor]:
        import torch

        generator = torch.Generator(device=device).manual_seed(seed)
        kind = getattr(torch, dtype)
        places = (case.batch, case.queries, case.heads, len(case.sizes), case.points)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        locations = 0.5 + 0.3 * draw(*places, 2)  # some lie outside the maps
        if case.wild:
            locations[:, 1::7] = math.inf
            locations[:, 2::7] = math.nan
            locations[:, 3::7] = -1e30
        shapes = torch.tensor(case.sizes, dtype=torch.int32, device=device)
        cells = shapes.prod(1)
        return {
            "value": draw(case.batch, case.keys, case.heads, case.channels).to(kind),
            "spatial_shapes": shapes,
            "level_start_index": (cells.cumsum(0) - cells).to(torch.int32),
            "sampling_locations": locations,
            "attention_weights": draw(*places).flatten(-2).softmax(-1).unflatten(-1, places[-2:]).to(kind),
            "output": torch.full(
                (case.batch, case.queries, case.heads * case.channels), math.nan, dtype=kind, device=device
            ),
        }

    def params(self, case: MsDeformAttnCase, operands: Operands) -> MsDeformAttnParams:
        params = MsDeformAttnParams(
            batch=case.batch, keys=case.keys, queries=case.queries, heads=case.heads, head_channels=case.channels,
            levels=len(case.sizes), points=case.points,
        )  # fmt: skip
        for name, tensor in operands.items():
            setattr(params, name, tensor.data_ptr())
        return params

    def reference(self, case: MsDeformAttnCase, operands: Operands) -> torch.Tensor:
        from internimage_deploy.exporter.models.ms_deform_attn import ms_deform_attn

        names = ("value", "sampling_locations", "attention_weights")
        value, locations, weights = (operands[name][:1].double() for name in names)
        if case.wild:  # those points weigh nothing
            tame = (locations.abs() < 1e4).all(-1)
            locations, weights = locations.where(tame[..., None], locations.new_zeros(())), weights * tame
        return ms_deform_attn(value, case.sizes, locations, weights)

    def difference(self, output: torch.Tensor, expected: torch.Tensor, dtype: str) -> tuple[float, float]:
        return numeric_difference(output, expected, dtype)

    def work(self, case: MsDeformAttnCase, dtype: str, variant: MsDeformAttnVariant | None) -> Work:
        size, outputs = SCALAR_BYTES[dtype], case.batch * case.queries * case.heads * case.channels
        points = case.batch * case.queries * case.heads * len(case.sizes) * case.points
        read = case.batch * case.keys * case.heads * case.channels
        moved = (read + outputs + points) * size + 2 * points * SCALAR_BYTES["float32"]
        return Work(moved, 4 * len(case.sizes) * case.points * outputs * size)

    def allowance(self, variant: MsDeformAttnVariant | None) -> float:
        return 1.0
