# SPDX-License-Identifier: Apache-2.0
"""The contract of UpsampleArgmax, the end of a network for TensorRT's plugin: from logits to labels in one step.

Input:

    logits  (N, classes, H, W)  float32, float16 or bfloat16

Output: labels (N, 4*H, 4*W), int32 (TensorRT takes uint8 from no plugin). It is what `Resize` (linear, half-pixel
centres, scales 1, 1, 4, 4) and `ArgMax` over the classes compute: of classes with the same largest value the lowest.
Values are interpolated in float32 whatever the dtype; the upsampled logits are never written. There are no attributes.
"""

from __future__ import annotations

OP_TYPE = "UpsampleArgmax"
FACTOR = 4
INPUTS = ("logits",)
OUTPUTS = ("labels",)
