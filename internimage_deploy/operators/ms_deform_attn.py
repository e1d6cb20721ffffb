# SPDX-License-Identifier: Apache-2.0
"""The contract of the MSDeformAttn operator: multi-scale deformable attention, as Mask2Former's pixel decoder uses it.

Source: Deformable DETR, https://arxiv.org/abs/2010.04159. The exporter's node, the ONNX function body and the TensorRT
plugin are each checked against this table. Inputs have the order and the layout of TensorRT's own plugin
`MultiscaleDeformableAttnPlugin_TRT` and of mmcv's `MMCVMultiScaleDeformableAttention`.

With heads M, channels per head D, levels L of sizes (H_l, W_l), points P, T = sum of H_l * W_l, and queries Q:

    value               (N, T, M, D)        float32, float16 or bfloat16; levels one after another, row by row
    spatial_shapes      (L, 2)              int64 (int32 for the plugin): (H_l, W_l)
    level_start_index   (L)                 of the same type: the first row of each level in `value`
    sampling_locations  (N, Q, M, L, P, 2)  float32: (x, y), 0 to 1 across the map of the level
    attention_weights   (N, Q, M, L, P)     of the type of `value`; softmaxed over levels and points

Output, of the type of `value`: (N, Q, M*D), head-major:

    out[n, q, m*D + d] = sum_l sum_p attention_weights[n, q, m, l, p]
                         * bilinear(value of level l, head m, channel d; y * H_l - 0.5, x * W_l - 0.5)

Bilinear sampling reads zero outside a map. Coordinates, weights and sums are float32 whatever the dtype.
There are no attributes: every size follows from the shapes.
"""

from __future__ import annotations

OP_TYPE = "MSDeformAttn"
INPUTS = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
OUTPUTS = ("output",)
TENSORRT_OP_TYPE = "MultiscaleDeformableAttnPlugin_TRT"  # TensorRT's own plugin with the same five inputs
