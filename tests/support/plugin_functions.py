# SPDX-License-Identifier: Apache-2.0
"""The plugins' operators as ONNX functions, so that ONNX Runtime runs a graph that was made for TensorRT."""

import onnx.parser

from internimage_deploy.onnx_tools.graph import attribute
from internimage_deploy.operators import contract
from internimage_deploy.operators.onnx_function import dcnv3_function

PACKED = """
<opset_import: ["": {opset}, "internimage": 1], domain: "internimage">
DCNv3Packed <{names}> (input, offset_mask) => (output)
{{
  three = Constant <value_ints = [3]> ()
  zero = Constant <value_ints = [0]> ()
  two = Constant <value_ints = [2]> ()
  all = Shape <start = 3, end = 4> (offset_mask)
  third = Div (all, three)
  middle = Mul (third, two)
  offset = Slice (offset_mask, zero, middle, three)
  mask = Slice (offset_mask, middle, all, three)
  output = internimage.DCNv3 <{attributes}> (input, offset, mask)
}}
"""


def define_plugins(proto):
    """Add a function for every plugin's operator of `proto`, and drop the attributes that only a parser reads."""
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    nodes = [node for node in proto.graph.node if node.domain == contract.DOMAIN]
    for node in nodes:
        kept = [entry for entry in node.attribute if not entry.name.startswith("plugin_")]
        del node.attribute[:]
        node.attribute.extend(kept)
    operators = {node.op_type for node in nodes}
    if operators & {contract.OP_TYPE, contract.PACKED_OP_TYPE}:
        (softmax,) = {attribute(node, "mask_softmax", 0) for node in nodes if node.op_type.startswith(contract.OP_TYPE)}
        proto.functions.append(dcnv3_function(opset, mask_softmax=bool(softmax)))
    if contract.PACKED_OP_TYPE in operators:
        names = [entry.name for entry in contract.ATTRIBUTES]
        passed = ", ".join(f"{entry.name}: {entry.type} = @{entry.name}" for entry in contract.ATTRIBUTES)
        text = PACKED.format(opset=opset, names=", ".join(names), attributes=passed)
        proto.functions.append(onnx.parser.parse_function(text))
