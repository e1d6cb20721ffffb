# SPDX-License-Identifier: Apache-2.0
"""The logits inside a model file that returns labels, made its output."""

from __future__ import annotations

import dataclasses

import onnx
from onnx import helper

from internimage_deploy.card import ModelCard, TensorSpec
from internimage_deploy.onnx_tools.graph import FLOAT, FLOAT16, Graph, element_types

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
    producer = {name: index for index, node in enumerate(graph.nodes) for name in node.output}
    if LOGITS not in producer:
        return None
    kind = element_types(graph).get(LOGITS)
    if kind is None or kind not in _DTYPES:
        return None
    batch, (height, width) = card.input.shape[0], card.network_size
    shape = (batch, len(card.classes), _quarter(height), _quarter(width))
    needed: set[int] = set()
    waiting = [LOGITS]
    while waiting:
        index = producer.get(waiting.pop())
        if index is not None and index not in needed:
            needed.add(index)
            waiting.extend(graph.nodes[index].input)
    model = graph.model.graph
    gone = {name for index, node in enumerate(graph.nodes) if index not in needed for name in node.output}
    graph.replace_nodes(node for index, node in enumerate(list(graph.nodes)) if index in needed)
    _remove(model.value_info, gone | {LOGITS})
    del model.output[:]
    model.output.append(helper.make_tensor_value_info(LOGITS, kind, shape))
    return dataclasses.replace(card, output=TensorSpec(LOGITS, _DTYPES[kind], shape))


def _quarter(side: int | str) -> int | str:
    return side // 4 if isinstance(side, int) else f"{side}/4"


def _remove(values: list[onnx.ValueInfoProto], names: set[str]) -> None:
    kept = [value for value in values if value.name not in names]
    del values[:]
    values.extend(kept)
