# SPDX-License-Identifier: Apache-2.0
"""Adaptive average pooling as two matrix products, exact at every size.

PyTorch's exporter writes `nn.AdaptiveAvgPool2d` for the size it happens to trace, without a word when that size is
meant to be free. Cell i of o averages the rows floor(i*n/o) to ceil((i+1)*n/o) of n: a matrix that follows from n,
which may be read from the input's shape while the graph runs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MatrixPool(nn.Module):
    """(N, C, H, W) to (N, C, cells, cells): what `nn.AdaptiveAvgPool2d(cells)` computes."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        return pooling_matrix(self.cells, x.shape[2], x) @ x @ pooling_matrix(self.cells, x.shape[3], x).transpose(0, 1)


def pooling_matrix(cells: int, size: int, like: Tensor) -> Tensor:
    """(cells, size): row i holds 1 / length over the elements that cell i averages; dtype and device of `like`."""
    cell = torch.arange(cells, device=like.device).unsqueeze(1) * size
    element = torch.arange(size, device=like.device) * cells
    # Multiplied out, so that the graph needs no integer division, which PyTorch's exporter writes as six operators:
    # floor(i*n/o) <= p  is  i*n < (p+1)*o,  and  p < ceil((i+1)*n/o)  is  p*o < (i+1)*n.
    inside = ((cell < element + cells) & (element < cell + size)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def replace_pooling(module: nn.Module) -> None:
    """Put `MatrixPool` in the place of every `nn.AdaptiveAvgPool2d` inside `module`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, MatrixPool(int(child.output_size)))  # type: ignore[arg-type]
