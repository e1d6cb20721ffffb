# SPDX-License-Identifier: Apache-2.0
"""DCNv3 on awkward shapes: operands, the expected output, and how near a result must be to it."""

import ml_dtypes
import numpy as np
import torch

from internimage_deploy.exporter.models.dcnv3 import dcnv3
from internimage_deploy.operators.contract import output_size

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Rounding of the stored output; inside, everything is float32.
UNIT = {"float32": 1e-5, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def _case(*, batch=1, height=9, width=7, channels=16, **op):
    settings = {"kernel": 3, "stride": 1, "pad": 1, "dilation": 1, "group": 2, "offset_scale": 1.0, **op}
    return {"size": (batch, height, width, channels), "op": settings}


CASES = {
    "plain": _case(),
    "batch": _case(batch=3, height=16, width=24, group=4),
    "stride 2": _case(stride=2),
    "unequal settings": _case(kernel=(1, 3), stride=(2, 1), pad=(0, 2), dilation=(1, 2)),
    "offset scale": _case(offset_scale=2.0, channels=32),
    "odd channels": _case(channels=5, group=3),
    "softmax inside": _case(mask_softmax=True, channels=32),
    "wider than 2048": _case(height=3, width=2304, group=1),
}


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def operands(case, dtype="float32", seed=0):
    """Input (N, H, W, G*C), offset (N, Ho, Wo, G*K*2) and mask (N, Ho, Wo, G*K) of `dtype`."""
    (batch, height, width, channels), op = case["size"], case["op"]
    sides = [pair(op[name]) for name in ("kernel", "stride", "pad", "dilation")]
    rows, columns = (output_size(size, *(side[axis] for side in sides)) for axis, size in enumerate((height, width)))
    points = sides[0][0] * sides[0][1]
    rng = np.random.default_rng(seed)
    input = rng.standard_normal((batch, height, width, op["group"] * channels), np.float32)
    offset = 2 * rng.standard_normal((batch, rows, columns, op["group"] * points * 2), np.float32)
    mask = rng.standard_normal((batch, rows, columns, op["group"], points), np.float32)
    if not op.get("mask_softmax"):
        mask = np.exp(mask) / np.exp(mask).sum(-1, keepdims=True)
    return tuple(array.astype(DTYPES[dtype]) for array in (input, offset, mask.reshape(batch, rows, columns, -1)))


def expected(case, arrays):
    """The exporter's PyTorch operator in float64, on the operands as they are stored."""
    tensors = [torch.from_numpy(np.asarray(array, np.float64)) for array in arrays]
    return dcnv3(*tensors, **case["op"]).numpy()


def assert_close(result, reference, dtype):
    """`result` equals the float64 `reference` up to the rounding of `dtype`."""
    unit = UNIT[dtype]
    np.testing.assert_allclose(np.asarray(result, np.float64), reference, rtol=unit, atol=unit)
