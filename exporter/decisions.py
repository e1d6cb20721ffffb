# SPDX-License-Identifier: Apache-2.0
"""Attention masks while an export is compared with PyTorch.

Mask2Former masks a position where a logit is negative. A logit within rounding error of zero may fall on either side
in another runtime, and moves its query by far more than rounding would. So the file is run with PyTorch's own
decisions, and its decisions are compared with them where they are not ties: together that checks every number, and no
tie can spoil it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from internimage_deploy.errors import UserError
from internimage_deploy.exporter.models.mask2former import Decision

if TYPE_CHECKING:
    import onnx

Logits = npt.NDArray[np.float32]
Masked = npt.NDArray[np.bool_]

_NODES = "decode_head.attention_masks.decision/And"
_INPUT = "decision_{}"


@contextmanager
def recorded(segmentor: nn.Module) -> Iterator[list[Logits]]:
    """The logits (N, Q, T) behind every attention mask that `segmentor` computes meanwhile, in order."""
    logits: list[Logits] = []

    def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        logits.append(arguments[0].numpy().copy())

    handles = [m.register_forward_pre_hook(record) for m in segmentor.modules() if isinstance(m, Decision)]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def expose(model: onnx.ModelProto) -> list[str]:
    """Make every decision in the graph an output, and let the rest of the graph read an input in its place.

    Returns:
        The names of the outputs, in order; `inputs` feeds the inputs.
    """
    from onnx import TensorProto, helper

    names = [node.output[0] for node in model.graph.node if node.name.startswith(_NODES)]
    for index, name in enumerate(names):
        for node in model.graph.node:
            for slot, value in enumerate(node.input):
                if value == name:
                    node.input[slot] = _INPUT.format(index)
        model.graph.input.append(helper.make_tensor_value_info(_INPUT.format(index), TensorProto.BOOL, [None] * 3))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.BOOL, [None] * 3))
    return names


def inputs(logits: list[Logits]) -> dict[str, Masked]:
    """PyTorch's decisions as the graph's inputs."""
    return {_INPUT.format(index): _masked(values) for index, values in enumerate(logits)}


def check(decisions: list[npt.NDArray[Any]], logits: list[Logits], tolerance: float) -> None:
    """Compare the file's decisions with PyTorch's.

    Raises:
        UserError: they differ where a logit is further from zero than `tolerance` times the largest one.
    """
    for layer, (got, values) in enumerate(zip(decisions, logits, strict=True)):
        close = tolerance * max(1.0, float(np.abs(values).max()))
        tie = np.abs(values) <= close
        tie |= np.abs(values.max(-1, keepdims=True)) <= close  # whether the row is cleared is the tie
        wrong = (got != _masked(values)) & ~tie
        if wrong.any():
            raise UserError(
                f"the exported file disagrees with PyTorch: {int(wrong.sum())} of {wrong.size} positions of the "
                f"attention mask of decoder layer {layer} are not PyTorch's; report this with the checkpoint's name"
            )


def _masked(logits: Logits) -> Masked:
    masked: Masked = (logits < 0) & (logits.max(-1, keepdims=True) >= 0)
    return masked
