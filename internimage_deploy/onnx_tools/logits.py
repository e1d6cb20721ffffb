# SPDX-License-Identifier: Apache-2.0
"""The logits inside a model file that returns labels, made its output."""

from __future__ import annotations

import dataclasses

from onnx import helper

from internimage_deploy.card import ModelCard, TensorSpec
from internimage_deploy.onnx_tools.graph import FLOAT, FLOAT16, Graph, drop_unused, element_types

LOGITS = "logits"
"""Name of the decode head's output in every file that `export-onnx` writes, whatever the file itself returns."""

_DTYPES: dict[int, str] = {FLOAT: "float32", FLOAT16: "float16"}


def return_logits(graph: Graph, card: ModelCard) -> ModelCard | None:
    """Make the logits the model's output, in place, and leave out what only the labels needed.

    Args:
        graph: a model that returns labels.
        card: its card.

    Returns:
        The card with the new output (N, classes, H/4, W/4); None where the model has no such value, and is unchanged.

    Raises:
        UserError: the graph has a damaged node.
    """
    if not any(LOGITS in node.output for node in graph.nodes):
        return None
    kind = element_types(graph).get(LOGITS)
    if kind is None or kind not in _DTYPES:
        return None
    batch, (height, width) = card.input.shape[0], card.network_size
    shape = (batch, len(card.classes), _quarter(height), _quarter(width))
    model = graph.model.graph
    del model.output[:]
    model.output.append(helper.make_tensor_value_info(LOGITS, kind, shape))
    drop_unused(graph)
    described = [value for value in model.value_info if value.name != LOGITS]  # an output is described by itself
    del model.value_info[:]
    model.value_info.extend(described)
    return dataclasses.replace(card, output=TensorSpec(LOGITS, _DTYPES[kind], shape))


def _quarter(side: int | str) -> int | str:
    return side // 4 if isinstance(side, int) else f"{side}/4"
