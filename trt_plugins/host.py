# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' arithmetic on the host: the same C++ source, compiled for the CPU on the first call.

It exists to prove the kernels where there is no GPU, one simulated thread after another; it is exact, not fast.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from internimage_deploy.cache import (
    build_once,
    cache_folder,
    fingerprint,
    host_compiler,
    run_compiler,
)
from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.operators import ms_deform_attn as ms_deform_attn_contract
from internimage_deploy.operators.contract import output_size
from internimage_deploy.trt_plugins.build import KERNELS, SOURCES

HOST_SOURCES = (*(f"{kernel}_{part}.cpp" for kernel in KERNELS for part in ("host", "variants")), "grid.cpp")
KERNEL = SOURCES / "kernel"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=default", "-Wall", "-Wextra")
DTYPES = ("float32", "float16", "bfloat16")

Pair = int | tuple[int, int]
Array = npt.NDArray[np.generic]  # of one of DTYPES; NumPy's stubs do not know bfloat16


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("image", "row", "pixel")]


class Params(ctypes.Structure):
    """`Dcnv3Params` of dcnv3_params.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "offset", "mask", "output")),
        *((f"{name}_strides", _Strides) for name in ("input", "offset", "mask", "output")),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("batch", "height", "width", "out_height", "out_width", "groups", "group_channels"),
                *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
            )
        ),
        ("offset_scale", ctypes.c_float),
        ("mask_softmax", ctypes.c_int32),
    ]


class MsDeformAttnParams(ctypes.Structure):
    """`MsDeformAttnParams` of ms_deform_attn_params.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*ms_deform_attn_contract.INPUTS, "output")),
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "keys", "queries", "heads", "head_channels", "levels", "points")
        ),
    ]


@dataclass(frozen=True)
class Variant:
    """One compiled DCNv3 kernel: channels per access, accesses per thread, group width (0: any), softmax built in."""

    dtype: str
    width: int
    vectors: int
    group: int
    softmax: bool


@dataclass(frozen=True)
class MsDeformAttnVariant:
    """One compiled MSDeformAttn kernel: channels per access, accesses per thread, points of a level (0: any)."""

    dtype: str
    width: int
    vectors: int
    points: int


def _pair(value: Pair, name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
    if len(pair) != 2:
        raise UserError(f"{name} is {value!r}: expected an integer or an (h, w) pair")
    return int(pair[0]), int(pair[1])


def compile_library(target: Path) -> None:
    """Compile the host library to `target`. Raises `UserError` with the compiler's output if that fails."""
    sources = [str(KERNEL / name) for name in HOST_SOURCES]
    run_compiler([host_compiler(), *FLAGS, *sources, "-o", str(target)], cache_folder() / "host" / "build.log")


@functools.cache
def library() -> ctypes.CDLL:
    """The host library, compiled on the first call of this user with these sources."""
    key = fingerprint([*KERNEL.glob("*.h"), *(KERNEL / name for name in HOST_SOURCES)], [host_compiler(), *FLAGS])
    target = cache_folder() / "host" / f"libkernels_host-{key}.so"
    build_once(target, compile_library)
    return bind(target)


def bind(path: Path) -> ctypes.CDLL:
    """Load a host library and declare its functions."""
    loaded = ctypes.CDLL(str(path))
    loaded.dcnv3_host_run.argtypes = [ctypes.POINTER(Params), ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    loaded.dcnv3_host_run.restype = ctypes.c_char_p
    loaded.dcnv3_host_is_distinct.argtypes = [ctypes.POINTER(Params), ctypes.c_int32, ctypes.c_int32]
    loaded.dcnv3_host_variants.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    for name in ("dcnv3_host_narrow", "dcnv3_host_widen"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
        getattr(loaded, name).restype = None
    block = ctypes.POINTER(MsDeformAttnParams)
    loaded.ms_deform_attn_host_run.argtypes = [block, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    loaded.ms_deform_attn_host_run.restype = ctypes.c_char_p
    loaded.ms_deform_attn_host_is_distinct.argtypes = [block, ctypes.c_int32, ctypes.c_int32]
    loaded.ms_deform_attn_host_variants.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    for size, params in (
        (loaded.dcnv3_host_params_size(), Params),
        (loaded.ms_deform_attn_host_params_size(), MsDeformAttnParams),
    ):
        if size != ctypes.sizeof(params):
            raise RuntimeError(f"{path}: its parameter block differs from host.{params.__name__}")
    return loaded


def _address_and_strides(array: Array) -> tuple[int, _Strides]:
    return array.ctypes.data, _Strides(*(step // array.itemsize for step in array.strides[:3]))


def _ready(array: npt.ArrayLike, name: str) -> Array:
    ready = np.asarray(array)
    if ready.ndim != 4:
        raise UserError(f"{name} has shape {ready.shape}: expected four dimensions (N, H, W, channels)")
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
    )  # fmt: skip
    for name, side in zip(("kernel", "stride", "pad", "dilation"), sides, strict=True):
        setattr(params, f"{name}_h", side[0])
        setattr(params, f"{name}_w", side[1])
    for name, array in (("input", input), ("offset", offset), ("mask", mask), ("output", output)):
        address, strides = _address_and_strides(array)
        setattr(params, name, address)
        setattr(params, f"{name}_strides", strides)
    return params, output


def run(params: Params, dtype: str, *, tactic: int = 0, loaded: ctypes.CDLL | None = None) -> Variant:
    """Run the DCNv3 kernel over a parameter block and return the variant that served it; `tactic` 0 is the default.

    Raises:
        UserError: the kernel refuses the parameters; the message is the C++ one.
    """
    chosen = (ctypes.c_int32 * 4)()
    code = DTYPES.index(dtype)
    error = (loaded or library()).dcnv3_host_run(ctypes.byref(params), code, tactic, chosen)
    if error:
        raise UserError(f"DCNv3: {error.decode()}")
    return Variant(dtype, chosen[0], chosen[1], chosen[2], bool(chosen[3]))


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
        tactic: Launch configuration, 1 to `tactics()`; 0 is the default.

    Returns:
        (N, Ho, Wo, G*C), of the input's dtype.

    Raises:
        UserError: shapes or dtypes do not fit, or no C++ compiler is installed.
    """
    arrays = [_ready(a, n) for a, n in ((input, "input"), (offset, "offset"), (mask, "mask"))]
    params, output = make_params(
        arrays[0], arrays[1], arrays[2], kernel=kernel, stride=stride, pad=pad, dilation=dilation, group=group,
        offset_scale=offset_scale, mask_softmax=mask_softmax,
    )  # fmt: skip
    run(params, output.dtype.name, tactic=tactic)
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


def run_ms_deform_attn(params: MsDeformAttnParams, dtype: str, *, tactic: int = 0) -> MsDeformAttnVariant:
    """Run the MSDeformAttn kernel and return the variant that served it; `tactic` 0 is the default.

    Raises:
        UserError: the kernel refuses the parameters; the message is the C++ one.
    """
    chosen = (ctypes.c_int32 * 3)()
    error = library().ms_deform_attn_host_run(ctypes.byref(params), DTYPES.index(dtype), tactic, chosen)
    if error:
        raise UserError(f"MSDeformAttn: {error.decode()}")
    return MsDeformAttnVariant(dtype, *chosen)


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
        tactic: Launch configuration, 1 to `tactics()`; 0 is the default.

    Returns:
        (N, Q, M*D), of the dtype of `value`.

    Raises:
        UserError: shapes or dtypes do not fit, or no C++ compiler is installed.
    """
    params, output, inputs = make_ms_deform_attn_params(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )
    run_ms_deform_attn(params, output.dtype.name, tactic=tactic)
    del inputs  # until here the kernel read their memory
    return output


def tactics() -> int:
    """Number of launch configurations, of either kernel."""
    return int(library().dcnv3_host_tactics())


def variants() -> list[Variant]:
    """Every DCNv3 kernel that is compiled, for the device and for the host alike."""
    count = library().dcnv3_host_variants(None, 0)
    rows = np.empty((count, 5), np.int32)
    library().dcnv3_host_variants(rows.ctypes.data, count)
    return [Variant(DTYPES[row[0]], int(row[1]), int(row[2]), int(row[3]), bool(row[4])) for row in rows]


def ms_deform_attn_variants() -> list[MsDeformAttnVariant]:
    """Every MSDeformAttn kernel that is compiled, for the device and for the host alike."""
    count = library().ms_deform_attn_host_variants(None, 0)
    rows = np.empty((count, 4), np.int32)
    library().ms_deform_attn_host_variants(rows.ctypes.data, count)
    return [MsDeformAttnVariant(DTYPES[row[0]], int(row[1]), int(row[2]), int(row[3])) for row in rows]


def bfloat16() -> np.dtype[np.generic]:
    """NumPy's bfloat16, from ml_dtypes. Raises `MissingDependency` if that is not installed."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingDependency("ml_dtypes", "test", "bfloat16 in NumPy") from error
    return np.dtype(ml_dtypes.bfloat16)
