# SPDX-License-Identifier: Apache-2.0
"""The host library: the CUDA kernels' C++ source, compiled for the CPU on the first call, and its operators.

`host` calls it with arrays.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from internimage_deploy.cache import build_once, cache_folder, fingerprint, host_compiler, run_compiler
from internimage_deploy.errors import UserError
from internimage_deploy.operators import ms_deform_attn
from internimage_deploy.trt_plugins.build import KERNELS, SOURCES

HOST_SOURCES = (*(f"{kernel}_{part}.cpp" for kernel in KERNELS for part in ("host", "variants")), "grid.cpp")
KERNEL = SOURCES / "kernel"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=default", "-Wall", "-Wextra")
DTYPES = ("float32", "float16", "bfloat16")
# How a kernel computes a point; see `Body` in grid.h.
BODIES = ("branching", "branch-free", "half")


class Strides(ctypes.Structure):
    """`Strides` of dcnv3_params.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("image", "row", "pixel")]


class Params(ctypes.Structure):
    """`Dcnv3Params` of dcnv3_params.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "offset", "mask", "output")),
        *((f"{name}_strides", Strides) for name in ("input", "offset", "mask", "output")),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("batch", "height", "width", "out_height", "out_width", "groups", "group_channels"),
                *("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w"),
            )
        ),
        ("offset_scale", ctypes.c_float),
        ("mask_softmax", ctypes.c_int32),
        ("allow_half", ctypes.c_int32),
    ]


class MsDeformAttnParams(ctypes.Structure):
    """`MsDeformAttnParams` of ms_deform_attn_params.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*ms_deform_attn.INPUTS, "output")),
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "keys", "queries", "heads", "head_channels", "levels", "points")
        ),
    ]


class UpsampleArgmaxParams(ctypes.Structure):
    """`UpsampleArgmaxParams` of upsample_argmax_params.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "labels")),
        *((name, ctypes.c_int32) for name in ("batch", "classes", "height", "width")),
    ]


class Variant(NamedTuple):
    """One compiled DCNv3 kernel.

    Attributes:
        dtype: storage type.
        width: channels per access.
        vectors: accesses per thread and corner.
        group: channels per group, 0 for any number.
        softmax: whether it takes mask logits; with `group` 0 either.
        body: how it computes a point, one of `BODIES`.
    """

    dtype: str
    width: int
    vectors: int
    group: int
    softmax: bool
    body: str = BODIES[0]


class MsDeformAttnVariant(NamedTuple):
    """One compiled MSDeformAttn kernel: channels per access, accesses per thread, points of a level (0: any)."""

    dtype: str
    width: int
    vectors: int
    points: int


class UpsampleArgmaxVariant(NamedTuple):
    """One compiled UpsampleArgmax kernel: rows of labels that a thread computes."""

    dtype: str
    rows: int


V = TypeVar("V")


@dataclass(frozen=True)
class Operator(Generic[V]):
    """An operator of the host library.

    Attributes:
        prefix: of its C functions.
        name: in messages.
        params: its parameter block.
        fields: number of integers that select a kernel; the first is the storage type.
        variant: makes the kernel's description from its storage type and the other integers.
    """

    prefix: str
    name: str
    params: type[ctypes.Structure]
    fields: int
    variant: Callable[..., V]

    def bind(self, loaded: ctypes.CDLL) -> None:
        """Declare the C functions. Raises `RuntimeError` if the library has another parameter block."""
        functions = {name: getattr(loaded, f"{self.prefix}_host_{name}") for name in ("run", "is_distinct", "variants")}
        block = ctypes.POINTER(self.params)
        functions["run"].argtypes = [block, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
        functions["run"].restype = ctypes.c_char_p
        functions["is_distinct"].argtypes = [block, ctypes.c_int32, ctypes.c_int32]
        functions["variants"].argtypes = [ctypes.c_void_p, ctypes.c_int32]
        if getattr(loaded, f"{self.prefix}_host_params_size")() != ctypes.sizeof(self.params):
            raise RuntimeError(f"the parameter block of {self.name} differs from host.{self.params.__name__}")

    def run(self, params: ctypes.Structure, dtype: str, *, tactic: int = 0, loaded: ctypes.CDLL | None = None) -> V:
        """Run the kernel over a parameter block and return the variant that served it; `tactic` 0 is the default.

        Raises:
            UserError: the kernel refuses the parameters; the message is the C++ one.
        """
        function = getattr(loaded or library(), f"{self.prefix}_host_run")
        chosen = (ctypes.c_int32 * self.fields)()
        error = function(ctypes.byref(params), DTYPES.index(dtype), tactic, chosen)
        if error:
            raise UserError(f"{self.name}: {error.decode()}")
        return self._described(list(chosen))

    def distinct_tactics(self, params: ctypes.Structure, dtype: str) -> list[int]:
        """The tactics that do not come to the same launch as an earlier one."""
        function = getattr(library(), f"{self.prefix}_host_is_distinct")
        code = DTYPES.index(dtype)
        return [tactic for tactic in range(1, tactics() + 1) if function(ctypes.byref(params), code, tactic)]

    def variants(self) -> list[V]:
        """Every kernel that is compiled, for the device and for the host alike."""
        function = getattr(library(), f"{self.prefix}_host_variants")
        rows = np.empty((function(None, 0), self.fields), np.int32)
        function(rows.ctypes.data, len(rows))
        return [self._described(row) for row in rows.tolist()]

    def _described(self, row: list[int]) -> V:
        return self.variant(DTYPES[row[0]], *row[1:])


def _dcnv3_variant(dtype: str, width: int, vectors: int, group: int, softmax: int, body: int) -> Variant:
    return Variant(dtype, width, vectors, group, bool(softmax), BODIES[body])


DCNV3 = Operator("dcnv3", "DCNv3", Params, 6, _dcnv3_variant)
MS_DEFORM_ATTN = Operator("ms_deform_attn", "MSDeformAttn", MsDeformAttnParams, 4, MsDeformAttnVariant)
UPSAMPLE_ARGMAX = Operator("upsample_argmax", "UpsampleArgmax", UpsampleArgmaxParams, 2, UpsampleArgmaxVariant)


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
    for name in ("host_narrow", "host_widen"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
        getattr(loaded, name).restype = None
    DCNV3.bind(loaded)
    MS_DEFORM_ATTN.bind(loaded)
    UPSAMPLE_ARGMAX.bind(loaded)
    return loaded


def tactics() -> int:
    """Number of launch configurations, of any kernel."""
    return int(library().host_tactics())
