# SPDX-License-Identifier: Apache-2.0
"""MSDeformAttn in standard ONNX operators: the model-local function that lets any ONNX runtime execute the node.

`ms_deform_attn` states the mathematics. Every level is sampled by one `GridSample` whose images are the heads,
(N*M, D, H_l, W_l), with the points of a query side by side, where the sum over them is a reduction of the innermost
axis.
GridSample (align_corners = 0) reads pixel p at g = (2p + 1) / size - 1, hence g = 2 * location - 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internimage_deploy.operators import contract, ms_deform_attn

if TYPE_CHECKING:
    import onnx

_SHARED = """
  one_1d = Constant <value_ints = [1]> ()
  two_1d = Constant <value_ints = [2]> ()
  three_1d = Constant <value_ints = [3]> ()
  zero_1d = Constant <value_ints = [0]> ()
  minus_one_1d = Constant <value_ints = [-1]> ()
  one_f = Constant <value_float = 1.0> ()
  two_f = Constant <value_float = 2.0> ()
  levels_1d = Constant <value_ints = [{levels}]> ()
  batch_1d = Shape <start = 0, end = 1> (value)
  heads_1d = Shape <start = 2, end = 3> (value)
  channels_1d = Shape <start = 3, end = 4> (value)
  queries_1d = Shape <start = 1, end = 2> (sampling_locations)
  points_1d = Shape <start = 4, end = 5> (sampling_locations)
  images_1d = Mul (batch_1d, heads_1d)
  value_f = Cast <to = 1> (value)
  value_nmdt = Transpose <perm = [0, 2, 3, 1]> (value_f)
  locations_f = Cast <to = 1> (sampling_locations)
  doubled = Mul (locations_f, two_f)
  moved = Sub (doubled, one_f)
  grid_lnmqp = Transpose <perm = [3, 0, 2, 1, 4, 5]> (moved)
  grid_shape = Concat <axis = 0> (levels_1d, images_1d, queries_1d, points_1d, two_1d)
  grids = Reshape (grid_lnmqp, grid_shape)
  weights_f = Cast <to = 1> (attention_weights)
  weights_lnmqp = Transpose <perm = [3, 0, 2, 1, 4]> (weights_f)
  weights_shape = Concat <axis = 0> (levels_1d, images_1d, one_1d, queries_1d, points_1d)
  weights = Reshape (weights_lnmqp, weights_shape)
"""

_LEVEL = """
  index_{l} = Constant <value_int = {l}> ()
  index_1d_{l} = Constant <value_ints = [{l}]> ()
  size_{l} = Gather <axis = 0> (spatial_shapes, index_{l})
  height_{l} = Slice (size_{l}, zero_1d, one_1d)
  width_{l} = Slice (size_{l}, one_1d, two_1d)
  tokens_{l} = Mul (height_{l}, width_{l})
  start_{l} = Gather <axis = 0> (level_start_index, index_1d_{l})
  end_{l} = Add (start_{l}, tokens_{l})
  level_{l} = Slice (value_nmdt, start_{l}, end_{l}, three_1d)
  map_shape_{l} = Concat <axis = 0> (images_1d, channels_1d, height_{l}, width_{l})
  maps_{l} = Reshape (level_{l}, map_shape_{l})
  grid_{l} = Gather <axis = 0> (grids, index_{l})
  samples_{l} = GridSample <mode = "{bilinear}", padding_mode = "zeros", align_corners = 0> (maps_{l}, grid_{l})
  weights_{l} = Gather <axis = 0> (weights, index_{l})
  weighted_{l} = Mul (samples_{l}, weights_{l})
  level_sum_{l} = ReduceSum <keepdims = 0> (weighted_{l}, minus_one_1d)
"""

_OUTPUT = """
  channels_of_all_1d = Mul (heads_1d, channels_1d)
  sums_shape = Concat <axis = 0> (batch_1d, channels_of_all_1d, queries_1d)
  sums_ncq = Reshape (sum_{last}, sums_shape)
  sums_nqc = Transpose <perm = [0, 2, 1]> (sums_ncq)
  output = CastLike (sums_nqc, value)
"""


def ms_deform_attn_function(opset: int, levels: int) -> onnx.FunctionProto:
    """The function `internimage::MSDeformAttn` over `levels` maps.

    `opset` is the version of the model's standard operators, 16 or later. The number of levels is written into the
    body; a model's nodes therefore need to agree on it. Values may be float32, float16 or bfloat16; everything in
    between is float32.

    Raises:
        ValueError: `opset` has no GridSample.
    """
    import onnx.parser

    if opset < 16:
        raise ValueError(f"opset {opset} has no GridSample; 16 or later is needed")
    body = _SHARED.format(levels=levels)
    for level in range(levels):
        body += _LEVEL.format(l=level, bilinear="bilinear" if opset < 20 else "linear")
        previous = f"Add (sum_{level - 1}, level_sum_{level})" if level else "Identity (level_sum_0)"
        body += f"  sum_{level} = {previous}\n"
    body += _OUTPUT.format(last=levels - 1)
    text = (
        f'<opset_import: ["": {opset}], domain: "{contract.DOMAIN}">\n'
        f"{ms_deform_attn.OP_TYPE} ({', '.join(ms_deform_attn.INPUTS)})"
        f" => ({', '.join(ms_deform_attn.OUTPUTS)})\n{{{body}}}\n"
    )
    function: onnx.FunctionProto = onnx.parser.parse_function(text)
    return function
