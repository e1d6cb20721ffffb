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

from internimage_deploy.trt_plugins import host
from internimage_deploy.trt_plugins.build import KERNELS

if TYPE_CHECKING:
    import torch

SCALAR_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Rounding of the stored output, absolute and relative; inside, everything is float32. What a tactic that rounds more
# may differ by is the same with a factor: see `allowance` of an operator.
UNIT = {"float32": 1e-5, "float16": 2.0**-11, "bfloat16": 2.0**-8}

Operands = Mapping[str, Any]
"""Tensors by name, "output" among them."""


class Case(Protocol):
    """Sizes and settings of one call."""

    @property
    def label(self) -> str:
        """A short name."""
        ...


class Operator(Protocol):
    """One kernel, and all that a benchmark must know of it."""

    name: str

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
        """Random operands on `device`; the output is filled with NaN."""
        ...

    def params(self, case: Any, operands: Operands) -> ctypes.Structure:
        """The kernel's parameter block over the operands' memory."""
        ...

    def reference(self, case: Any, operands: Operands) -> torch.Tensor:
        """The output in float64, of the first image, (1, ...)."""
        ...

    def work(self, case: Any, dtype: str, variant: Any | None) -> Work:
        """Bytes and instructions of one call that `variant` serves; None if that is not known."""
        ...

    def allowance(self, variant: Any | None) -> float:
        """How many roundings of the output a variant may be off."""
        ...

    def run_on_host(self, params: ctypes.Structure, dtype: str, tactic: int) -> Any:
        """Run the host build of the kernel over operands in host memory; returns the variant that served it."""
        ...

    def variants(self) -> Sequence[Any]:
        """Every variant that is compiled."""
        ...


def operators() -> dict[str, Operator | None]:
    """Every compiled kernel's operator by name; None for one that nobody has described here."""
    from dcnv3_operator import Dcnv3
    from ms_deform_attn_operator import MsDeformAttn

    described: dict[str, Operator] = {operator.name: operator for operator in (Dcnv3(), MsDeformAttn())}
    return {name: described.get(name) for name in KERNELS}


def tactics(operator: Operator, params: ctypes.Structure, dtype: str) -> list[int]:
    """Tactics of the library that are different launches for these parameters, 0 (the default) first."""
    distinct = getattr(host.library(), f"{operator.name}_host_is_distinct")
    code = host.DTYPES.index(dtype)
    every = range(1, host.tactics() + 1)
    return [0, *(tactic for tactic in every if distinct(ctypes.byref(params), code, tactic))]


def difference(result: torch.Tensor, expected: torch.Tensor, dtype: str) -> tuple[float, float]:
    """The largest difference from the float64 reference, and the largest in roundings of the output's type.

    Both are NaN where the result holds a NaN.
    """
    distance = (result[: len(expected)].double() - expected).abs()
    return float(distance.max()), float((distance / (UNIT[dtype] * (1 + expected.abs()))).max())
