# SPDX-License-Identifier: Apache-2.0
"""Files that the official repository exported: no model card, `mmdeploy::TRTDCNv3` nodes, labels of some integer type.

They are converted to the form of our own exports: input `input` (N, 3, H, W) float32, output `labels` (N, H, W).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from internimage_deploy.card import ModelCard, TensorSpec
from internimage_deploy.errors import UserError
from internimage_deploy.onnx_tools.graph import FLOAT, Graph, UniqueNames
from internimage_deploy.operators.onnx_function import dcnv3_function
from internimage_deploy.runtime.engine.plugin_nodes import rename_official

Classes = tuple[str, ...]
Palette = tuple[tuple[int, int, int], ...]  # RGB

OPSET = 17  # official files have 11; the function needs 16, and every parser from TensorRT 8.5 on reads 17


def upgrade_official(graph: Graph) -> None:
    """Convert the operators of `graph` to `OPSET`, and add the function of its DCNv3 nodes, in place.

    Raises:
        UserError: onnx cannot convert one of its operators.
    """
    from onnx import version_converter

    if graph.opset < OPSET:
        onnx.load_external_data_for_model(graph.model, str(graph.folder))
        try:
            graph.model = version_converter.convert_version(graph.model, OPSET)
        except RuntimeError as error:
            raise UserError(
                f"the file's operators cannot be brought from opset {graph.opset} to {OPSET}: {error}"
            ) from error
    if rename_official(graph):
        graph.model.functions.append(dcnv3_function(graph.opset))
        graph.model.ir_version = max(graph.model.ir_version, 9)  # the first whose functions have default attributes


def adapt_official(graph: Graph, classes: Classes, palette: Palette, size: tuple[int, int] | None) -> ModelCard:
    """Give `graph` the input and output of our own exports, and make the card that it lacks.

    Args:
        graph: the model, changed in place.
        classes: class names in the order of the ids.
        palette: an RGB colour per class.
        size: (height, width) in pixels, for a graph whose input size is free and is to be fixed; None to keep it.

    Raises:
        UserError: the graph has other inputs or outputs than such a file, or another size.
    """
    main = graph.model.graph
    stored = {tensor.name for tensor in main.initializer}
    inputs = [value for value in main.input if value.name not in stored]
    if len(inputs) != 1 or len(main.output) != 1:
        raise UserError(
            f"the model has {len(inputs)} inputs and {len(main.output)} outputs, expected one image and one label map"
        )
    source = _adapt_input(graph, inputs[0], size)
    labels = _adapt_output(graph, main.output[0], source.shape, len(classes))
    return ModelCard("mmdeploy export", classes, palette, source, labels, tools={"exporter": graph.model.producer_name})


def _adapt_input(graph: Graph, value: onnx.ValueInfoProto, size: tuple[int, int] | None) -> TensorSpec:
    shape = _shape(value)
    if value.type.tensor_type.elem_type != FLOAT or len(shape) != 4 or shape[1] not in (3, None):
        raise UserError(f"the model's input '{value.name}' is not a float32 image (N, 3, H, W), got {_text(shape)}")
    if size is not None and any(side not in (None, fixed) for side, fixed in zip(shape[2:], size, strict=True)):
        raise UserError(f"--size {size[0]}x{size[1]}, but this model takes {shape[2]}x{shape[3]} only")
    height, width = size or shape[2:]
    names: tuple[int | str, ...] = (shape[0] or "batch", 3, height or "height", width or "width")
    _rename(graph, value.name, "input")
    value.CopyFrom(helper.make_tensor_value_info("input", FLOAT, names))
    return TensorSpec("input", "float32", names)


def _adapt_output(graph: Graph, value: onnx.ValueInfoProto, source: tuple[int | str, ...], classes: int) -> TensorSpec:
    """Squeeze, argmax and cast the graph's output until it is (N, H, W) of the smallest label type."""
    shape = _shape(value)
    kind = value.type.tensor_type.elem_type
    names = UniqueNames(graph.names())
    current = names.new("official_output")
    _rename(graph, value.name, current)
    nodes: list[onnx.NodeProto] = []
    if len(shape) == 4 and kind == FLOAT:
        nodes.append(
            helper.make_node("ArgMax", [current], [names.new("classes")], name="labels/ArgMax", axis=1, keepdims=0)
        )
    elif len(shape) == 4 and shape[1] in (1, None):
        nodes.append(_squeeze(graph, names, current))
    elif len(shape) != 3 or kind == FLOAT:
        raise UserError(f"the model's output '{value.name}' of shape {_text(shape)} is neither labels nor logits")
    if nodes:
        current = nodes[-1].output[0]
    to = TensorProto.UINT8 if classes <= 256 else TensorProto.INT32
    nodes.append(helper.make_node("Cast", [current], ["labels"], name="labels/Cast", to=to))
    graph.model.graph.node.extend(nodes)
    spec = TensorSpec("labels", "uint8" if classes <= 256 else "int32", (source[0], *source[2:]))
    value.CopyFrom(helper.make_tensor_value_info("labels", to, spec.shape))
    return spec


def _squeeze(graph: Graph, names: UniqueNames, current: str) -> onnx.NodeProto:
    result = names.new("squeezed")
    axes = names.new("labels/axes")
    graph.model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), axes))
    return helper.make_node("Squeeze", [current, axes], [result], name="labels/Squeeze")


def _rename(graph: Graph, old: str, new: str) -> None:
    for node in graph.nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _shape(value: onnx.ValueInfoProto) -> list[int | None]:
    return [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]


def _text(shape: list[int | None]) -> str:
    return "(" + ", ".join("free" if side is None else str(side) for side in shape) + ")"
