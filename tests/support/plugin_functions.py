# SPDX-License-Identifier: Apache-2.0
"""The plugins' operators as ONNX functions, so that ONNX Runtime runs a graph that was made for TensorRT."""

import onnx.parser

from internimage_deploy.onnx_tools.graph import attribute
from internimage_deploy.operators import contract, upsample_argmax
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


UPSAMPLE_ARGMAX = """
<opset_import: ["": {opset}], domain: "internimage">
UpsampleArgmax (logits) => (labels)
{{
  scales = Constant <value_floats = [1.0, 1.0, 4.0, 4.0]> ()
  logits_f = Cast <to = 1> (logits)
  upsampled = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (logits_f, , scales)
  best = ArgMax <axis = 1, keepdims = 0> (upsampled)
  labels = Cast <to = 6> (best)
}}
"""


def define_plugins(proto):
    """Add a function for every plugin's operator of `proto`, and drop the attributes that only a parser reads."""
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    nodes = [node for node in proto.graph.node if node.domain == contract.DOMAIN]
    for node in nodes:
        dropped = ("plugin_version", "plugin_namespace", "allow_half")
        kept = [entry for entry in node.attribute if entry.name not in dropped]
        del node.attribute[:]
        node.attribute.extend(kept)
    operators = {node.op_type for node in nodes}
    if operators & {contract.OP_TYPE, contract.PACKED_OP_TYPE}:
        (softmax,) = {attribute(node, "mask_softmax", 0) for node in nodes if node.op_type.startswith(contract.OP_TYPE)}
        proto.functions.append(dcnv3_function(opset, mask_softmax=bool(softmax)))
    if upsample_argmax.OP_TYPE in operators:
        proto.functions.append(onnx.parser.parse_function(UPSAMPLE_ARGMAX.format(opset=opset)))
    if contract.PACKED_OP_TYPE in operators:
        names = [entry.name for entry in contract.ATTRIBUTES]
        passed = ", ".join(f"{entry.name}: {entry.type} = @{entry.name}" for entry in contract.ATTRIBUTES)
        text = PACKED.format(opset=opset, names=", ".join(names), attributes=passed)
        proto.functions.append(onnx.parser.parse_function(text))
