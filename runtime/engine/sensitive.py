# SPDX-License-Identifier: Apache-2.0
"""Parts of a graph whose results jump or drift when their inputs are rounded, so that they compute in float32.

- What a comparison decides on, back to the product it comes from: Mask2Former's attention masks, where a logit on the
  other side of zero moves a query by far more than rounding would.
- Products of two computed operands that a sigmoid turns into probabilities, and the product that reads them: its masks.
- Where multi-scale deformable attention samples: a location times the size of a map loses whole pixels in float16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from internimage_deploy.onnx_tools.graph import FLOAT, Graph, consumers, node_name, words
from internimage_deploy.operators import contract, ms_deform_attn

LOCATIONS = ms_deform_attn.INPUTS.index("sampling_locations")

_COMPARISONS = words("Less LessOrEqual Greater GreaterOrEqual Equal")
_PRODUCTS = words("MatMul Gemm Conv ConvTranspose Einsum")


def sensitive_nodes(graph: Graph, types: Mapping[str, int]) -> set[str]:
    """Names of the nodes that these rules keep in float32; `types` are the values' element types."""
    walk = _Walk(graph, types)
    kept: set[str] = set()
    for node in graph.nodes:
        if node.op_type in _COMPARISONS and any(types.get(name) == FLOAT for name in node.input):
            kept.add(node_name(node))
            kept.update(node_name(before) for name in node.input for before in walk.back_to_product(name))
        elif node.op_type == "Sigmoid":
            before = list(walk.back_to_product(node.input[0]))
            if before and walk.is_product_of_two(before[-1]):
                kept.update(map(node_name, (node, *before, *walk.products_after(node.output[0]))))
        elif (node.domain, node.op_type) == (contract.DOMAIN, ms_deform_attn.OP_TYPE):
            kept.update(node_name(before) for before in walk.back_before_product(node.input[LOCATIONS]))
    return kept


class _Walk:
    """Follows float values through the graph."""

    def __init__(self, graph: Graph, types: Mapping[str, int]) -> None:
        self.types = types
        self.producers = {name: node for node in graph.nodes for name in node.output}
        self.readers = consumers(graph.nodes)
        self.stored = {tensor.name for tensor in graph.model.graph.initializer}

    def back_to_product(self, name: str) -> Iterator[onnx.NodeProto]:
        """The nodes that compute `name`, from it back to the first products and with them."""
        return self._back(name)

    def back_before_product(self, name: str) -> Iterator[onnx.NodeProto]:
        """The nodes that compute `name`, from it back to the first products and without them."""
        return (node for node in self._back(name) if node.op_type not in _PRODUCTS)

    def is_product_of_two(self, node: onnx.NodeProto) -> bool:
        """True for a product of computed values: no operand is a weight."""
        return node.op_type in ("MatMul", "Einsum") and not any(name in self.stored for name in node.input)

    def products_after(self, name: str) -> list[onnx.NodeProto]:
        """The products of two computed operands that read `name`, through reshapes."""
        found, waiting = [], [name]
        while waiting:
            for node in self.readers.get(waiting.pop(), ()):
                if self.is_product_of_two(node):
                    found.append(node)
                elif node.op_type in ("Reshape", "Transpose", "Flatten"):
                    waiting.extend(node.output)
        return found

    def _back(self, name: str) -> Iterator[onnx.NodeProto]:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            node = self.producers.get(waiting.pop(0))
            if node is None or node_name(node) in seen or self.types.get(node.output[0]) != FLOAT:
                continue
            seen.add(node_name(node))
            yield node
            if node.op_type not in _PRODUCTS:
                waiting.extend(node.input)
