# SPDX-License-Identifier: Apache-2.0
"""Export options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from internimage_deploy.errors import UserError

Input = Literal["uint8", "float"]
Emit = Literal["labels", "logits"]
Activation = Literal["GELU", "GELU_tanh", "ReLU", "SiLU"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

SIZE_DIVISOR = 32
OPSETS = (16, 17, 18)
DEFAULT_OPSET = 17
DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportOptions:
    """Shape, interface and rewrites of an exported model.

    Attributes:
        size: (height, width) in pixels, multiples of 32; None leaves both free.
        batch: number of images per run; None leaves it free.
        input: `uint8` takes `image` (N, H, W, 3) RGB and normalises inside the graph; `float` takes `input`
            (N, 3, H, W), normalised.
        emit: `labels` (N, H, W) at network size, or `logits` (N, classes, H/4, W/4).
        plain: True switches every algebraic rewrite off.
        without: names of rewrites to leave out.
        opset: version of the standard operators. 17 is the first with LayerNormalization; for 16, which TensorRT 8.5
            reads, it is decomposed into simpler operators.
    """

    size: tuple[int, int] | None = None
    batch: int | None = None
    input: Input = "uint8"
    emit: Emit = "labels"
    plain: bool = False
    without: tuple[str, ...] = ()
    opset: int = DEFAULT_OPSET

    def __post_init__(self) -> None:
        """Check every value but the names of rewrites, which `rewrites.select` knows.

        Raises:
            UserError: a value is not among those that can be exported.
        """
        if self.size is not None and not _is_network_size(self.size):
            raise UserError(
                f"size: got {self.size!r}, expected (height, width) in pixels, multiples of {SIZE_DIVISOR}, or None"
            )
        if self.batch is not None and (type(self.batch) is not int or self.batch < 1):
            raise UserError(f"batch: got {self.batch!r}, expected an integer of at least 1, or None")
        for name, allowed in (("input", get_args(Input)), ("emit", get_args(Emit)), ("opset", OPSETS)):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise UserError(f"{name}: got {getattr(self, name)!r}, expected one of {choices}")


def _is_network_size(size: object) -> bool:
    return (
        isinstance(size, tuple)
        and len(size) == 2
        and all(type(side) is int and side >= SIZE_DIVISOR and side % SIZE_DIVISOR == 0 for side in size)
    )
