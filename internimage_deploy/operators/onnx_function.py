# SPDX-License-Identifier: Apache-2.0
"""DCNv3 in standard ONNX operators: the model-local function that lets any ONNX runtime execute the node.

`contract` states the mathematics. The layout follows from one choice: the sampling grid is (N*G, Ho*Wo, K, 2), so that
every group of channels is one image for `GridSample` and the K points of an output position lie side by side, where the
sum over them is a reduction of the innermost axis.

GridSample (align_corners = 0) reads pixel p at g = (2p + 1) / size - 1, hence grid = offset * (2 * scale / size) + base
where base holds the positions of the kernel points without offsets. `base` depends on shapes only: runtimes fold it
into a constant when the sizes are fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internimage_deploy.operators import contract

if TYPE_CHECKING:
    import onnx

_CONSTANTS = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  two = Constant <value_int = 2> ()
  one_f = Constant <value_float = 1.0> ()
  two_f = Constant <value_float = 2.0> ()
  one_1d = Constant <value_ints = [1]> ()
  two_1d = Constant <value_ints = [2]> ()
  minus_one_1d = Constant <value_ints = [-1]> ()
  column = Constant <value_ints = [-1, 1]> ()
  only_x = Constant <value_floats = [1.0, 0.0]> ()
  only_y = Constant <value_floats = [0.0, 1.0]> ()
"""

_SIZES = """
  batch_1d = Shape <start = 0, end = 1> (input)
  height_1d = Shape <start = 1, end = 2> (input)
  width_1d = Shape <start = 2, end = 3> (input)
  out_h_1d = Shape <start = 1, end = 2> (offset)
  out_w_1d = Shape <start = 2, end = 3> (offset)
  out_h = Squeeze (out_h_1d)
  out_w = Squeeze (out_w_1d)
  points = Mul (kernel_h, kernel_w)
  points_1d = Reshape (points, one_1d)
  group_1d = Reshape (group, one_1d)
  group_channels_1d = Reshape (group_channels, one_1d)
  channels_1d = Mul (group_1d, group_channels_1d)
  images_1d = Mul (batch_1d, group_1d)
"""

# One axis of the kernel points without offsets, in GridSample's -1..1 coordinates: base_AXIS (out, K).
_AXIS = """
  span_{a} = Sub (kernel_{a}, one)
  reach_{a} = Mul (span_{a}, dilation_{a})
  centre_{a} = Div (reach_{a}, two)
  steps_{a} = Mul (index_of_point_{a}, dilation_{a})
  points_{a} = Sub (steps_{a}, centre_{a})
  points_f_{a} = Cast <to = 1> (points_{a})
  points_scaled_{a} = Mul (points_f_{a}, offset_scale)
  index_{a} = Range (zero, out_{a}, one)
  start_{a} = Mul (index_{a}, stride_{a})
  shift_{a} = Sub (centre_{a}, pad_{a})
  reference_{a} = Add (start_{a}, shift_{a})
  reference_f_{a} = Cast <to = 1> (reference_{a})
  reference_column_{a} = Reshape (reference_f_{a}, column)
  pixel_{a} = Add (reference_column_{a}, points_scaled_{a})
  pixel_2_{a} = Mul (pixel_{a}, two_f)
  pixel_2_1_{a} = Add (pixel_2_{a}, one_f)
  size_f_{a} = Cast <to = 1> ({size})
  ratio_{a} = Div (pixel_2_1_{a}, size_f_{a})
  base_{a} = Sub (ratio_{a}, one_f)
"""

# Point k is (x, y) = (k // kernel_h, k % kernel_h).
_BASE = (
    """
  point = Range (zero, points, one)
  index_of_point_w = Div (point, kernel_h)
  column_start = Mul (index_of_point_w, kernel_h)
  index_of_point_h = Sub (point, column_start)
"""
    + _AXIS.format(a="h", size="height_1d")
    + _AXIS.format(a="w", size="width_1d")
    + """
  base_h_shape = Concat <axis = 0> (out_h_1d, one_1d, points_1d, one_1d)
  base_w_shape = Concat <axis = 0> (one_1d, out_w_1d, points_1d, one_1d)
  base_h_4d = Reshape (base_h, base_h_shape)
  base_w_4d = Reshape (base_w, base_w_shape)
  base_y = Mul (base_h_4d, only_y)
  base_x = Mul (base_w_4d, only_x)
  base = Add (base_y, base_x)
"""
)

# The unit is expanded to a whole row because multiplying by a vector of two is slow in ONNX Runtime (inner loop of 2).
_GRID = """
  size_xy = Concat <axis = 0> (size_f_w, size_f_h)
  scale_2 = Mul (offset_scale, two_f)
  unit_pair = Div (scale_2, size_xy)
  unit_shape = Concat <axis = 0> (out_w_1d, points_1d, two_1d)
  unit = Expand (unit_pair, unit_shape)
  offset_f = Cast <to = 1> (offset)
  offset_shape = Concat <axis = 0> (batch_1d, out_h_1d, out_w_1d, group_1d, points_1d, two_1d)
  offset_nhwg = Reshape (offset_f, offset_shape)
  offset_nghw = Transpose <perm = [0, 3, 1, 2, 4, 5]> (offset_nhwg)
  moved = Mul (offset_nghw, unit)
  grid_nghw = Add (moved, base)
  grid_shape = Concat <axis = 0> (images_1d, minus_one_1d, points_1d, two_1d)
  grid = Reshape (grid_nghw, grid_shape)
"""

_SAMPLES = """
  input_f = Cast <to = 1> (input)
  input_nchw = Transpose <perm = [0, 3, 1, 2]> (input_f)
  images_shape = Concat <axis = 0> (images_1d, group_channels_1d, height_1d, width_1d)
  images = Reshape (input_nchw, images_shape)
  samples = GridSample <mode = "{bilinear}", padding_mode = "zeros", align_corners = 0> (images, grid)
"""

_WEIGHTS = """
  mask_f = Cast <to = 1> (mask)
  mask_shape = Concat <axis = 0> (batch_1d, minus_one_1d, group_1d, points_1d)
  mask_npg = Reshape (mask_f, mask_shape)
  mask_ready = {activation} (mask_npg)
  mask_ngp = Transpose <perm = [0, 2, 1, 3]> (mask_ready)
  weights_shape = Concat <axis = 0> (images_1d, one_1d, minus_one_1d, points_1d)
  weights = Reshape (mask_ngp, weights_shape)
"""

_SUM = """
  weighted = Mul (samples, weights)
  sums = ReduceSum <keepdims = 0> (weighted, minus_one_1d)
  sums_shape = Concat <axis = 0> (batch_1d, channels_1d, out_h_1d, out_w_1d)
  sums_nchw = Reshape (sums, sums_shape)
  sums_nhwc = Transpose <perm = [0, 2, 3, 1]> (sums_nchw)
  output = CastLike (sums_nhwc, input)
"""


def dcnv3_function(opset: int, *, mask_softmax: bool = False) -> onnx.FunctionProto:
    """The function `internimage::DCNv3` for a model whose standard operators are of version `opset` (16 or later).

    Every attribute of the contract is declared. All but `mask_softmax` are referenced by the body; that one chooses
    between two bodies instead, because an `If` would remain a conditional layer in every node of a TensorRT-RTX engine.
    A model therefore needs all its nodes to agree on it.

    Inputs may be float32, float16 or bfloat16; everything in between is float32.

    Raises:
        ValueError: `opset` has no GridSample.
    """
    import onnx.parser

    if opset < 16:
        raise ValueError(f"opset {opset} has no GridSample; 16 or later is needed")
    softmax = int(mask_softmax)
    declared = [a.name for a in contract.ATTRIBUTES if a.default is None]
    defaults = [
        f"{a.name}: {a.type} = {softmax if a.name == 'mask_softmax' else a.default}"
        for a in contract.ATTRIBUTES
        if a.default is not None
    ]
    references = "".join(
        f"  {a.name} = Constant <value_{a.type}: {a.type} = @{a.name}> ()\n"
        for a in contract.ATTRIBUTES
        if a.name != "mask_softmax"
    )
    body = (_CONSTANTS, references, _SIZES, _BASE, _GRID, _SAMPLES, _WEIGHTS, _SUM)
    text = (
        f'<opset_import: ["": {opset}], domain: "{contract.DOMAIN}">\n'
        f"{contract.OP_TYPE} <{', '.join(declared + defaults)}> ({', '.join(contract.INPUTS)})"
        f" => ({', '.join(contract.OUTPUTS)})\n{{{''.join(body)}}}\n"
    )
    text = text.replace("{bilinear}", "bilinear" if opset < 20 else "linear")
    text = text.replace("{activation}", "Softmax <axis = -1>" if mask_softmax else "Identity")
    # Nodes stay without names: parsers that inline the function would see each name once per DCNv3 node.
    function: onnx.FunctionProto = onnx.parser.parse_function(text)
    return function
