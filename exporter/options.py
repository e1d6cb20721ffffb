# SPDX-License-Identifier: Apache-2.0
"""What one can choose about an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SIZE_DIVISOR = 32
OPSETS = (16, 17, 18)
DEFAULT_OPSET = 17


@dataclass(frozen=True)
class ExportOptions:
    """Shape, interface and rewrites of an exported model.

    Attributes:
        size: (height, width) in pixels, multiples of 32; None leaves both free.
        batch: pictures per run; None leaves it free.
        input: `uint8` takes `image` (N, H, W, 3) RGB and normalises inside the graph; `float` takes `input`
            (N, 3, H, W), normalised.
        emit: `labels` (N, H, W) at network size, or `logits` (N, classes, H/4, W/4).
        plain: True switches every algebraic rewrite off.
        without: names of rewrites to leave out.
        opset: version of the standard operators. 17 is the first with LayerNormalization; 16 spells it out in simpler
            operators, for TensorRT 8.5.
    """

    size: tuple[int, int] | None = None
    batch: int | None = None
    input: Literal["uint8", "float"] = "uint8"
    emit: Literal["labels", "logits"] = "labels"
    plain: bool = False
    without: tuple[str, ...] = ()
    opset: int = DEFAULT_OPSET

    def __post_init__(self) -> None:
        """Refuse what cannot be exported. Raises `ValueError`."""
        if self.size is not None and any(side < SIZE_DIVISOR or side % SIZE_DIVISOR for side in self.size):
            raise ValueError(f"size {self.size}: height and width must be multiples of {SIZE_DIVISOR}")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch {self.batch}: at least 1")
        if self.opset not in OPSETS:
            raise ValueError(f"opset {self.opset}: one of {', '.join(map(str, OPSETS))}")
