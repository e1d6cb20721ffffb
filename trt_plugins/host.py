# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' arithmetic on the host, called with arrays.

It exists to prove the kernels where there is no GPU, one simulated thread after another; it is exact, not fast.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.operators import ms_deform_attn as ms_deform_attn_contract
from internimage_deploy.operators.contract import output_size
from internimage_deploy.trt_plugins.host_operators import (
    DCNV3,
    DTYPES,
    MS_DEFORM_ATTN,
    UPSAMPLE_ARGMAX,
    MsDeformAttnParams,
    Params,
    Strides,
    UpsampleArgmaxParams,
)

Pair = int | tuple[int, int]
Array = npt.NDArray[np.generic]  # of one of DTYPES; NumPy's stubs do not know bfloat16


def _pair(value: Pair, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
    if len(pair) != 2:
        raise UserError(f"{name} is {value!r}: expected an integer or an (h, w) pair")
    return int(pair[0]), int(pair[1])


def _address_and_strides(array: Array) -> tuple[int, Strides]:
    return array.ctypes.data, Strides(*(step // array.itemsize for step in array.strides[:3]))


def _ready(array: npt.ArrayLike, name: str, dimensions: str = "(N, H, W, channels)") -> Array:
    ready = np.asarray(array)
    if ready.ndim != 4:
        raise UserError(f"{name} has shape {ready.shape}: expected four dimensions {dimensions}")
    if ready.dtype.name not in DTYPES:
        raise UserError(f"{name} is {ready.dtype}: expected one of {', '.join(DTYPES)}")
    # Rows and images may have gaps, as the kernel allows; channels may not.
    dense = ready.strides[3] == ready.itemsize and all(step > 0 for step in ready.strides)
    return ready if dense else np.ascontiguousarray(ready)


def make_params(
    input: Array,
    offset: Array,
    mask: Array,
    *,
    kernel: Pair,
    stride: Pair,
    pad: Pair,
    dilation: Pair,
    group: int,
    offset_scale: float,
    mask_softmax: bool = False,
    allow_half: bool = False,
) -> tuple[Params, Array]:
    """The kernel's parameter block, and the output array it writes; both use the arrays' memory.

    Raises:
        UserError: shapes or dtypes do not fit the settings.
    """
    if not input.dtype == offset.dtype == mask.dtype:
        raise UserError(f"input, offset and mask are {input.dtype}, {offset.dtype} and {mask.dtype}: expected one type")
    sides = [_pair(value, name) for value, name in ((kernel, "kernel"), (stride, "stride"), (pad, "pad"))]
    sides.append(_pair(dilation, "dilation"))
    batch, height, width, channels = input.shape
    rows, columns = (output_size(size, *(side[axis] for side in sides)) for axis, size in enumerate((height, width)))
    points = sides[0][0] * sides[0][1]
    if group < 1 or channels % group:
        raise UserError(f"input has {channels} channels: expected a multiple of group = {group}")
    for name, array, depth in (("offset", offset, 2 * points * group), ("mask", mask, points * group)):
        if array.shape != (batch, rows, columns, depth):
            raise UserError(f"{name} has shape {array.shape}: expected {(batch, rows, columns, depth)}")
    # NaN marks an element that nobody wrote.
    output = np.full((batch, rows, columns, channels), np.nan, dtype=input.dtype)
    params = Params(
        batch=batch, height=height, width=width, out_height=rows, out_width=columns,
        groups=group, group_channels=channels // group, offset_scale=offset_scale, mask_softmax=int(mask_softmax),
        allow_half=int(allow_half),
    )  # fmt: skip
    for name, side in zip(("kernel", "stride", "pad", "dilation"), sides, strict=True):
        setattr(params, f"{name}_h", side[0])
        setattr(params, f"{name}_w", side[1])
    for name, array in (("input", input), ("offset", offset), ("mask", mask), ("output", output)):
        address, strides = _address_and_strides(array)
        setattr(params, name, address)
        setattr(params, f"{name}_strides", strides)
    return params, output


def dcnv3(
    input: npt.ArrayLike,
    offset: npt.ArrayLike,
    mask: npt.ArrayLike,
    *,
    kernel: Pair,
    stride: Pair,
    pad: Pair,
    dilation: Pair,
    group: int,
    offset_scale: float,
    mask_softmax: bool = False,
    allow_half: bool = False,
    tactic: int = 0,
) -> Array:
    """DCNv3 as the CUDA kernel computes it.

    Args:
        input: (N, H, W, G*C), float32, float16 or bfloat16 (ml_dtypes).
        offset: (N, Ho, Wo, G*K*2), pairs (x, y) in pixels, of the input's dtype.
        mask: (N, Ho, Wo, G*K), weights, or logits when `mask_softmax`; of the input's dtype.
        kernel: Sampling points; like `stride`, `pad` and `dilation` (pixels) an integer or an (h, w) pair.
        stride: See `kernel`.
        pad: See `kernel`.
        dilation: See `kernel`.
        group: Number of groups G.
        offset_scale: Scales the whole sampling grid.
        mask_softmax: Whether the softmax over the K points is the operator's work.
        allow_half: Whether tactics may interpolate float16 values in float16.
        tactic: Launch configuration, 1 to `host_operators.tactics()`; 0 is the default.

    Returns:
        (N, Ho, Wo, G*C), of the input's dtype.

    Raises:
        UserError: shapes or dtypes do not fit, or no C++ compiler is installed.
    """
    arrays = [_ready(a, n) for a, n in ((input, "input"), (offset, "offset"), (mask, "mask"))]
    params, output = make_params(
        arrays[0], arrays[1], arrays[2], kernel=kernel, stride=stride, pad=pad, dilation=dilation, group=group,
        offset_scale=offset_scale, mask_softmax=mask_softmax, allow_half=allow_half,
    )  # fmt: skip
    DCNV3.run(params, output.dtype.name, tactic=tactic)
    return output


def make_ms_deform_attn_params(
    value: npt.ArrayLike,
    spatial_shapes: npt.ArrayLike,
    level_start_index: npt.ArrayLike,
    sampling_locations: npt.ArrayLike,
    attention_weights: npt.ArrayLike,
) -> tuple[MsDeformAttnParams, Array, tuple[Array, ...]]:
    """The MSDeformAttn kernel's parameter block, the output array it writes, and the arrays whose memory it reads.

    Raises:
        UserError: shapes or dtypes do not fit each other.
    """
    given = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    arrays = dict(zip(ms_deform_attn_contract.INPUTS, map(np.ascontiguousarray, given), strict=True))
    dtype = arrays["value"].dtype
    if dtype.name not in DTYPES:
        raise UserError(f"value is {dtype}: expected one of {', '.join(DTYPES)}")
    expected_types = {"sampling_locations": "float32", "attention_weights": dtype.name}
    for name, expected in expected_types.items():
        if arrays[name].dtype.name != expected:
            raise UserError(f"{name} is {arrays[name].dtype}: expected {expected}")
    for name in ("spatial_shapes", "level_start_index"):
        if not np.issubdtype(arrays[name].dtype, np.integer):
            raise UserError(f"{name} is {arrays[name].dtype}: expected integers")
        arrays[name] = arrays[name].astype(np.int32)
    for name, rank in (("value", 4), ("sampling_locations", 6)):
        if arrays[name].ndim != rank:
            raise UserError(f"{name} has shape {arrays[name].shape}: expected {rank} dimensions")
    batch, keys, heads, channels = arrays["value"].shape
    queries, levels, points = (arrays["sampling_locations"].shape[axis] for axis in (1, 3, 4))
    shapes = {
        "spatial_shapes": (levels, 2),
        "level_start_index": (levels,),
        "sampling_locations": (batch, queries, heads, levels, points, 2),
        "attention_weights": (batch, queries, heads, levels, points),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise UserError(f"{name} has shape {arrays[name].shape}: expected {shape}")
    # NaN marks an element that nobody wrote.
    output = np.full((batch, queries, heads * channels), np.nan, dtype=dtype)
    params = MsDeformAttnParams(
        batch=batch, keys=keys, queries=queries, heads=heads, head_channels=channels, levels=levels, points=points
    )
    for name, array in (*arrays.items(), ("output", output)):
        setattr(params, name, array.ctypes.data)
    return params, output, tuple(arrays.values())


def ms_deform_attn(
    value: npt.ArrayLike,
    spatial_shapes: npt.ArrayLike,
    level_start_index: npt.ArrayLike,
    sampling_locations: npt.ArrayLike,
    attention_weights: npt.ArrayLike,
    *,
    tactic: int = 0,
) -> Array:
    """Multi-scale deformable attention as the CUDA kernel computes it.

    Args:
        value: (N, T, M, D), float32, float16 or bfloat16 (ml_dtypes); levels one after another, row by row.
        spatial_shapes: (L, 2) integers, (height, width) of each level.
        level_start_index: (L) integers, the first of each level's T rows. A level that does not lie inside `value`
            reads zero.
        sampling_locations: (N, Q, M, L, P, 2) float32, (x, y) from 0 to 1 across the level's map.
        attention_weights: (N, Q, M, L, P), of the dtype of `value`.
        tactic: Launch configuration, 1 to `host_operators.tactics()`; 0 is the default.

    Returns:
        (N, Q, M*D), of the dtype of `value`.

    Raises:
        UserError: shapes or dtypes do not fit, or no C++ compiler is installed.
    """
    params, output, inputs = make_ms_deform_attn_params(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    MS_DEFORM_ATTN.run(params, output.dtype.name, tactic=tactic)
    del inputs  # until here the kernel read their memory
    return output


def upsample_argmax(logits: npt.ArrayLike, *, tactic: int = 0) -> npt.NDArray[np.int32]:
    """Labels at four times the size of the logits, as the CUDA kernel computes them.

    Args:
        logits: (N, classes, H, W), float32, float16 or bfloat16 (ml_dtypes).
        tactic: Launch configuration, 1 to `host_operators.tactics()`; 0 is the default.

    Returns:
        (N, 4*H, 4*W), the class with the largest logit after bilinear upsampling with half-pixel centres; the lowest of
        equal ones.

    Raises:
        UserError: shape or dtype do not fit, or no C++ compiler is installed.
    """
    ready = np.ascontiguousarray(_ready(logits, "logits", "(N, classes, H, W)"))
    batch, classes, height, width = ready.shape
    labels = np.full((batch, 4 * height, 4 * width), -1, np.int32)  # -1 marks an element that nobody wrote
    params = UpsampleArgmaxParams(ready.ctypes.data, labels.ctypes.data, batch, classes, height, width)
    UPSAMPLE_ARGMAX.run(params, ready.dtype.name, tactic=tactic)
    return labels


def bfloat16() -> np.dtype[np.generic]:
    """NumPy's bfloat16, from ml_dtypes. Raises `MissingDependency` if that is not installed."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingDependency("ml_dtypes", "test", "bfloat16 in NumPy") from error
    return np.dtype(ml_dtypes.bfloat16)
