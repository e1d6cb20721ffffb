# SPDX-License-Identifier: Apache-2.0
"""DCNv3 for the benchmarks; see plugin_operators.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from plugin_operators import SCALAR_BYTES, Operands, numeric_difference
from prediction import DCNV3_FLOAT16, Work

from internimage_deploy.exporter.presets import BACKBONES
from internimage_deploy.operators.contract import output_size
from internimage_deploy.trt_plugins.host_operators import DCNV3, Params, Variant

if TYPE_CHECKING:
    import torch

Pair = tuple[int, int]

HALF_ALLOWANCE = 4.0


@dataclass(frozen=True)
class Dcnv3Case:
    """One call of DCNv3; pairs are (h, w).

    Attributes:
        groups, channels: G groups of C channels.
        gap: unused elements behind each pixel's channels, in every tensor.
        packed: offsets and mask lie in one tensor, as one matrix product writes them.
        wild: some offsets are infinite, NaN or huge; such a point reads zero.
    """

    label: str
    batch: int
    height: int
    width: int
    groups: int
    channels: int
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    pad: Pair = (1, 1)
    dilation: Pair = (1, 1)
    offset_scale: float = 1.0
    softmax: bool = False
    gap: int = 0
    packed: bool = False
    wild: bool = False

    @property
    def points(self) -> int:
        """K, the sampling points of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def out_size(self) -> Pair:
        """(Ho, Wo)."""
        height, width = (
            output_size(side, self.kernel[axis], self.stride[axis], self.pad[axis], self.dilation[axis])
            for axis, side in enumerate((self.height, self.width))
        )
        return height, width


def stage_case(model: str, stage: int, batch: int, size: Pair = (512, 512)) -> Dcnv3Case:
    """Stage 1 to 4 of a released backbone for images of `size` (h, w)."""
    backbone = BACKBONES[model]
    stride, groups = 4 << (stage - 1), backbone.groups[stage - 1]
    return Dcnv3Case(
        f"{model} {size[0]}x{size[1]} stage{stage} b{batch}", batch, size[0] // stride, size[1] // stride, groups,
        (backbone.channels << (stage - 1)) // groups, offset_scale=backbone.offset_scale,
    )  # fmt: skip


class Dcnv3:
    """`Operator` of kernel/dcnv3_*."""

    host = DCNV3
    name = host.prefix

    def odd_cases(self) -> Sequence[Dcnv3Case]:
        widths = [
            Dcnv3Case(f"C{channels}{' softmax' if softmax else ''}", 2, 13, 9, 3, channels, softmax=softmax)
            for channels in (16, 32, 24, 12, 6, 5)
            for softmax in (False, True)
        ]
        return [
            *widths,
            Dcnv3Case("one pixel", 1, 1, 1, 2, 16),
            Dcnv3Case("one row of 2304", 1, 1, 2304, 1, 16),
            Dcnv3Case("stride 2", 2, 17, 10, 2, 16, stride=(2, 2)),
            Dcnv3Case("unequal settings", 1, 14, 19, 2, 16, (1, 3), (2, 1), (0, 2), (1, 2)),
            Dcnv3Case("5x5, dilated", 1, 20, 15, 2, 32, (5, 5), (1, 1), (4, 4), (2, 2)),
            Dcnv3Case("offset scale", 1, 12, 12, 2, 32, offset_scale=2.0),
            Dcnv3Case("gaps of 8", 2, 11, 7, 2, 16, gap=8),
            Dcnv3Case("gaps of 1", 2, 11, 7, 2, 16, gap=1),
            Dcnv3Case("packed", 2, 11, 7, 4, 16, softmax=True, packed=True),
            Dcnv3Case("packed, 5 groups", 1, 11, 7, 5, 16, softmax=True, packed=True),
            Dcnv3Case("wild offsets", 2, 24, 24, 2, 16, wild=True),
            Dcnv3Case("wild offsets, C12", 1, 9, 9, 1, 12, wild=True),
        ]

    def network_cases(self) -> Sequence[Dcnv3Case]:
        return [stage_case("t", stage, batch) for batch in (8, 1) for stage in (1, 3, 2, 4)]

    def small(self, case: Dcnv3Case) -> Dcnv3Case:
        return replace(case, batch=1, height=2 * case.kernel[0], width=2 * case.kernel[1])

    def draw(self, case: Dcnv3Case, dtype: str, device: str, seed: int) -> dict[str, torch.Tensor]:
        import torch

        generator = torch.Generator(device=device).manual_seed(seed)
        kind = getattr(torch, dtype)
        inside, outside = (case.batch, case.height, case.width), (case.batch, *case.out_size)
        depths = {"offset": case.groups * case.points * 2, "mask": case.groups * case.points}

        def draw(image: tuple[int, ...], depth: int) -> torch.Tensor:
            values = torch.randn(*image, depth + case.gap, generator=generator, device=device)
            return values.to(kind)[..., :depth]

        weights = draw(outside, depths["mask"])
        if not case.softmax:
            weights.copy_(weights.float().unflatten(-1, (case.groups, -1)).softmax(-1).flatten(-2))
        offset = draw(outside, depths["offset"])
        if case.wild:
            offset[..., ::6] = math.inf
            offset[..., 3::8] = math.nan
            offset[..., 4::10] = -6e4
        if case.packed:
            joint = torch.cat((offset, weights), -1)
            offset, weights = joint.split(list(depths.values()), -1)
        channels = case.groups * case.channels
        output = torch.full((*outside, channels + case.gap), math.nan, dtype=kind, device=device)
        return {
            "input": draw(inside, channels), "offset": offset, "mask": weights, "output": output[..., :channels],
        }  # fmt: skip

    def params(self, case: Dcnv3Case, operands: Operands) -> Params:
        out_height, out_width = case.out_size
        params = Params(
            batch=case.batch, height=case.height, width=case.width, out_height=out_height, out_width=out_width,
            groups=case.groups, group_channels=case.channels, offset_scale=case.offset_scale,
            mask_softmax=int(case.softmax), allow_half=1,
        )  # fmt: skip
        for name in ("kernel", "stride", "pad", "dilation"):
            for side, value in zip("hw", getattr(case, name), strict=True):
                setattr(params, f"{name}_{side}", value)
        for name in ("input", "offset", "mask", "output"):
            setattr(params, name, operands[name].data_ptr())
            strides = getattr(params, f"{name}_strides")
            strides.image, strides.row, strides.pixel = operands[name].stride()[:3]
        return params

    def reference(self, case: Dcnv3Case, operands: Operands) -> torch.Tensor:
        from internimage_deploy.exporter.models.dcnv3 import dcnv3

        input, offset, mask = (operands[name][:1].double() for name in ("input", "offset", "mask"))
        if case.wild:  # those points weigh nothing
            pairs = offset.unflatten(-1, (-1, 2))
            tame = (pairs.abs() < 1e4).all(-1)
            offset, mask = pairs.where(tame[..., None], pairs.new_zeros(())).flatten(-2), mask * tame
        return dcnv3(
            input, offset, mask, kernel=case.kernel, stride=case.stride, pad=case.pad, dilation=case.dilation,
            group=case.groups, offset_scale=case.offset_scale, mask_softmax=case.softmax,
        )  # fmt: skip

    def difference(self, output: torch.Tensor, expected: torch.Tensor, dtype: str) -> tuple[float, float]:
        return numeric_difference(output, expected, dtype)

    def work(self, case: Dcnv3Case, dtype: str, variant: Variant | None) -> Work:
        size, pixels = SCALAR_BYTES[dtype], case.batch * case.out_size[0] * case.out_size[1]
        outputs = pixels * case.groups * case.channels
        read = case.batch * case.height * case.width * case.groups * case.channels
        moved = (read + outputs + pixels * case.groups * 3 * case.points) * size
        per_thread = None
        if variant is not None and dtype == "float16" and variant.group:
            per_thread = DCNV3_FLOAT16.get((variant.body, variant.vectors, variant.softmax))
        threads = outputs / (variant.width * variant.vectors) if variant is not None else 0
        return Work(moved, 4 * case.points * outputs * size, None if per_thread is None else per_thread * threads)

    def allowance(self, variant: Variant | None) -> float:
        # The half kernels round the four weights and sums of each of the K points.
        return HALF_ALLOWANCE if variant is not None and variant.body == "half" else 1.0
