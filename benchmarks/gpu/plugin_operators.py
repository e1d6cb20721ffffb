# SPDX-License-Identifier: Apache-2.0
"""The plugins' operators as the benchmarks see them: cases, operands, float64 references, work, and how to run them.

`operators` has a description for each kernel of `trt_plugins.build.KERNELS`; a kernel without one is reported as
failed, so that a new kernel cannot be forgotten.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from prediction import Work

from internimage_deploy.trt_plugins import host_operators
from internimage_deploy.trt_plugins.build import KERNELS

if TYPE_CHECKING:
    import torch

SCALAR_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Rounding of the stored output, absolute and relative; inside, everything is float32. What a tactic that rounds more
# may differ by is the same with a factor: see `allowance` of an operator.
UNIT = {"float32": 1e-5, "float16": 2.0**-11, "bfloat16": 2.0**-8}

Operands = Mapping[str, Any]
"""Tensors by name, "output" among them."""


class Operator(Protocol):
    """One kernel, and all that a benchmark must know of it."""

    name: str
    host: host_operators.Operator[Any]

    def odd_cases(self) -> Sequence[Any]:
        """Small shapes that together reach every compiled variant."""
        ...

    def network_cases(self) -> Sequence[Any]:
        """The shapes that it has in networks, the most telling first."""
        ...

    def small(self, case: Any) -> Any:
        """The same settings at a size that the host build takes no time for."""
        ...

    def draw(self, case: Any, dtype: str, device: str, seed: int) -> dict[str, torch.Tensor]:
        """Random operands on `device`; "output" holds what no kernel writes."""
        ...

    def params(self, case: Any, operands: Operands) -> ctypes.Structure:
        """The kernel's parameter block over the operands' memory."""
        ...

    def reference(self, case: Any, operands: Operands) -> torch.Tensor:
        """What the first image's output is judged by, in float64, (1, ...)."""
        ...

    def difference(self, output: torch.Tensor, expected: torch.Tensor, dtype: str) -> tuple[float, float]:
        """How far the first image's output is from the reference, and the same in roundings of the storage type.

        At most one rounding is right, but for a variant's `allowance`. NaN where an element is none or was not written.
        """
        ...

    def work(self, case: Any, dtype: str, variant: Any | None) -> Work:
        """Bytes and instructions of one call that `variant` serves; None if that is not known."""
        ...

    def allowance(self, variant: Any | None) -> float:
        """How many roundings of the output a variant may be off."""
        ...


def operators() -> dict[str, Operator | None]:
    """Every compiled kernel's operator by name; None for one that nobody has described here."""
    from dcnv3_operator import Dcnv3
    from ms_deform_attn_operator import MsDeformAttn
    from upsample_argmax_operator import UpsampleArgmax

    described: tuple[Operator, ...] = (Dcnv3(), MsDeformAttn(), UpsampleArgmax())
    by_name = {operator.name: operator for operator in described}
    return {name: by_name.get(name) for name in KERNELS}


def tactics(operator: Operator, params: ctypes.Structure, dtype: str) -> list[int]:
    """Tactics of the library that are different launches for these parameters, 0 (the default) first."""
    return [0, *operator.host.distinct_tactics(params, dtype)]


def poison(output: torch.Tensor) -> None:
    """Fill an output with what no kernel writes: NaN, or -1 among integers."""
    output.fill_(float("nan") if output.is_floating_point() else -1)


def numeric_difference(output: torch.Tensor, expected: torch.Tensor, dtype: str) -> tuple[float, float]:
    """`Operator.difference` of numbers."""
    distance = (output[: len(expected)].double() - expected).abs()
    return float(distance.max()), float((distance / (UNIT[dtype] * (1 + expected.abs()))).max())
