# SPDX-License-Identifier: Apache-2.0
"""UpsampleArgmax for the benchmarks; see plugin_operators.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from plugin_operators import SCALAR_BYTES, UNIT, Operands
from prediction import Work

from internimage_deploy.operators.upsample_argmax import FACTOR
from internimage_deploy.trt_plugins.host_operators import (
    UPSAMPLE_ARGMAX,
    UpsampleArgmaxParams,
    UpsampleArgmaxVariant,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class UpsampleArgmaxCase:
    """One call of UpsampleArgmax over logits (batch, classes, height, width).

    With `ties` the logits are 0 and 1 alone: interpolation is exact, and classes with equal values are everywhere.
    """

    label: str
    batch: int
    classes: int
    height: int
    width: int
    ties: bool = False


class UpsampleArgmax:
    """`Operator` of kernel/upsample_argmax_*."""

    host = UPSAMPLE_ARGMAX
    name = host.prefix

    def odd_cases(self) -> Sequence[UpsampleArgmaxCase]:
        sizes = [(1, 1, 1, 1), (2, 5, 1, 9), (1, 150, 7, 1), (2, 19, 13, 11), (1, 3, 20, 21)]
        cases = [UpsampleArgmaxCase(f"{c} classes {h}x{w} b{n}", n, c, h, w) for n, c, h, w in sizes]
        return [*cases, *(replace(case, label=f"{case.label}, ties", ties=True) for case in cases[1:])]

    def network_cases(self) -> Sequence[UpsampleArgmaxCase]:
        return [
            *(UpsampleArgmaxCase(f"150 classes 512x512 b{batch}", batch, 150, 128, 128) for batch in (8, 1)),
            UpsampleArgmaxCase("19 classes 512x1024 b1", 1, 19, 128, 256),
        ]

    def small(self, case: UpsampleArgmaxCase) -> UpsampleArgmaxCase:
        return replace(case, batch=1, height=2, width=2)

    def draw(self, case: UpsampleArgmaxCase, dtype: str, device: str, seed: int) -> dict[str, torch.Tensor]:
        import torch

        generator = torch.Generator(device=device).manual_seed(seed)
        shape = (case.batch, case.classes, case.height, case.width)
        logits = torch.randn(shape, generator=generator, device=device)
        if case.ties:
            logits = (logits > 0).float()
        size = (case.batch, FACTOR * case.height, FACTOR * case.width)
        labels = torch.full(size, -1, dtype=torch.int32, device=device)
        return {"logits": logits.to(getattr(torch, dtype)), "output": labels}

    def params(self, case: UpsampleArgmaxCase, operands: Operands) -> UpsampleArgmaxParams:
        logits, labels = operands["logits"].data_ptr(), operands["output"].data_ptr()
        return UpsampleArgmaxParams(logits, labels, case.batch, case.classes, case.height, case.width)

    def reference(self, case: UpsampleArgmaxCase, operands: Operands) -> torch.Tensor:
        """The upsampled logits (1, classes, 4H, 4W)."""
        import torch.nn.functional as F

        logits = operands["logits"][:1].double()
        return F.interpolate(logits, scale_factor=FACTOR, mode="bilinear", align_corners=False)

    def difference(self, output: torch.Tensor, expected: torch.Tensor, dtype: str) -> tuple[float, float]:
        """How far the logit of a label is below the largest one. Values are interpolated in float32, whatever `dtype`.

        Of exactly equal ones the lowest label is right; another counts as infinitely far.
        """
        import torch

        labels = output[: len(expected)].long()
        if int(labels.min()) < 0 or int(labels.max()) >= expected.shape[1]:
            return math.nan, math.nan
        best = expected.amax(1)
        numbers = torch.arange(expected.shape[1], device=expected.device)[:, None, None]
        lowest = numbers.where(expected == best[:, None], expected.shape[1]).amin(1)
        chosen = expected.gather(1, labels[:, None])[:, 0]
        distance = (best - chosen).where((chosen != best) | (labels == lowest), best.new_tensor(math.inf))
        return float(distance.max()), float((distance / (UNIT["float32"] * (1 + best.abs()))).max())

    def work(self, case: UpsampleArgmaxCase, dtype: str, variant: UpsampleArgmaxVariant | None) -> Work:
        logits = case.batch * case.classes * case.height * case.width * SCALAR_BYTES[dtype]
        labels = case.batch * FACTOR * case.height * FACTOR * case.width * 4
        # Four labels side by side in each of `rows` rows read four logits a class.
        rows = FACTOR if variant is None else variant.rows
        return Work(logits + labels, 4 * logits * FACTOR // rows)

    def allowance(self, variant: UpsampleArgmaxVariant | None) -> float:
        return 1.0
