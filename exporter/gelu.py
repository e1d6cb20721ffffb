# SPDX-License-Identifier: Apache-2.0
"""GELU in the order of operations that ONNX Runtime and TensorRT recognise and run as one kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ErfGelu(nn.Module):
    """x * (1 + erf(x / sqrt(2))) * 0.5: what `nn.GELU()` computes.

    PyTorch's exporter writes x * (0.5 * (1 + erf)), which no runtime fuses. Moving the 0.5 is exact.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.erf(x / math.sqrt(2)) + 1) * 0.5


def replace_gelu(module: nn.Module) -> None:
    """Put `ErfGelu` in the place of every `nn.GELU` of the erf form inside `module`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GELU) and child.approximate == "none":
                setattr(parent, name, ErfGelu())
