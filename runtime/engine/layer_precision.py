# SPDX-License-Identifier: Apache-2.0
"""float32 where the graph says so, for TensorRT 8.x, whose networks are weakly typed.

Such a compiler takes float16 for any layer that is faster with it, whatever types the graph has. What `precision`
keeps in float32 is told to it layer by layer, and it has to obey.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from types import ModuleType
from typing import TYPE_CHECKING

from internimage_deploy.onnx_tools.graph import FLOAT, Graph, element_types

if TYPE_CHECKING:
    import tensorrt as trt

OBEY = "OBEY_PRECISION_CONSTRAINTS"
"""Name of the builder flag without which the precision of layers is a hint."""

# They compute nothing, or TensorRT decides on their type by itself.
_WITHOUT_PRECISION = ("CONSTANT", "SHAPE", "CAST", "IDENTITY", "PLUGIN", "PLUGIN_V2", "PLUGIN_V3")


def float32_nodes(graph: Graph) -> tuple[str, ...]:
    """Names of the nodes of a converted `graph` that compute in float32: their outputs are, and they are no casts."""
    types = element_types(graph)
    return tuple(
        node.name
        for node in graph.nodes
        if node.name and node.op_type != "Cast" and any(types.get(name) == FLOAT for name in node.output)
    )


def node_of(layer: str, known: Collection[str]) -> str:
    """The node that the parser made `layer` for: it names layers after nodes, with a number where one needs several.

    `known` are the names of all nodes of the model.
    """
    return layer if layer in known else re.sub(r"_\d+$", "", layer)


def keep_float32(
    api: ModuleType, network: trt.INetworkDefinition, nodes: Collection[str], known: Collection[str]
) -> int:
    """Make the layers of `nodes` compute in and return float32; returns how many layers these are.

    Args:
        api: the module `tensorrt`, of 8.x.
        network: a parsed network.
        nodes: names of the nodes to keep.
        known: names of all nodes of the model.
    """
    wanted = set(nodes)
    kept = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if node_of(layer.name, known) not in wanted or layer.type.name in _WITHOUT_PRECISION:
            continue
        outputs = [layer.get_output(slot) for slot in range(layer.num_outputs)]
        # Sizes and indices are integers, and are computed on the CPU; they have no precision to choose.
        if any(tensor.is_shape_tensor or tensor.dtype != api.DataType.FLOAT for tensor in outputs):
            continue
        layer.precision = api.DataType.FLOAT
        for slot in range(len(outputs)):
            layer.set_output_type(slot, api.DataType.FLOAT)
        kept += 1
    return kept
