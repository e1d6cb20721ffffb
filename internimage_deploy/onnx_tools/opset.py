# SPDX-License-Identifier: Apache-2.0
"""Differences between versions of the standard operators, for every rewrite to an older opset."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Value = TypeVar("Value")

# Attributes that later versions of an operator added, with defaults that mean what the older version does.
ADDED_ATTRIBUTES = {
    "Cast": ("saturate", "round_mode"),
    "Split": ("num_outputs",),
    "Resize": ("antialias", "keep_aspect_ratio_policy"),
}


def decompose_layer_norm(
    op: Callable[..., Value], x: Value, weight: Value, bias: Value | None, epsilon: Value
) -> Value:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis, in operators of opset 13 to 17.

    `op` makes a node from the operator's name, its inputs and its attributes, and returns the node's output.
    """
    centred = op("Sub", x, op("ReduceMean", x, axes=[-1], keepdims=1))
    variance = op("ReduceMean", op("Mul", centred, centred), axes=[-1], keepdims=1)
    result = op("Mul", op("Div", centred, op("Sqrt", op("Add", variance, epsilon))), weight)
    return result if bias is None else op("Add", result, bias)
