# SPDX-License-Identifier: Apache-2.0
"""Kernels that DCNv3 is compared with, compiled from sources that the user points at; nothing of those is changed.

- official: InternImage's own kernel; the folder `segmentation/ops_dcnv3` of its repository.
- dcnv4: DCNv4's; the folder `DCNv4_op` of its repository.

shims/*.cu include their kernels' headers and launch them into memory that is there already. Their Python entry points
do more in every call: they fill the output with zeros first. That time is measured apart.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dcnv3_operator import Dcnv3Case
from kernel_library import HERE, compile_cuda
from task import Unavailable

if TYPE_CHECKING:
    import torch

CANDIDATES = {"official": "cuda/dcnv3_im2col_cuda.cuh", "dcnv4": "cuda/dcnv4_im2col_cuda.cuh"}
DTYPES = ("float32", "float16")
HEADERS = HERE / "shims" / "headers"

Call = Callable[[], None]


def sources_of(name: str, folder: Path | None) -> Path:
    """The folder `src` with the kernels of `name`.

    Raises:
        Unavailable: no folder was given, or it does not hold them.
    """
    if folder is None:
        raise Unavailable(f"no sources: pass --{name} DIR")
    for source in (folder / "src", folder, *sorted(folder.glob("*/src")), *sorted(folder.glob("*/*/src"))):
        if (source / CANDIDATES[name]).is_file():
            return source
    raise Unavailable(f"--{name} {folder}: no src/{CANDIDATES[name]} in it")


def compiler_flags(source: Path) -> list[str]:
    """Options of nvcc for kernels in `source` that include PyTorch's headers."""
    import torch

    headers = Path(torch.__file__).parent / "include"
    folders = [HEADERS, source, headers, headers / "torch" / "csrc" / "api" / "include"]
    return ["-std=c++20", "--expt-relaxed-constexpr", *(f"-I{folder}" for folder in folders)]


def build(name: str, folder: Path | None, capability: str) -> Path:
    """The library of a candidate for one compute capability, kept in the cache; takes a minute on the first call.

    Raises:
        Unavailable: see `sources_of`.
        UserError: the compiler fails.
    """
    import torch

    source = sources_of(name, folder)
    libraries = Path(torch.__file__).parent / "lib"
    # What their error messages call lies in PyTorch's library.
    link = [f"-L{libraries}", "-lc10", "-Xlinker", f"-rpath={libraries}"]
    depends = [*sorted(source.rglob("*.cuh")), *sorted(source.rglob("*.h")), *sorted(HEADERS.rglob("*.*h"))]
    flags = [*compiler_flags(source), *link]
    return compile_cuda(name, [HERE / "shims" / f"{name}.cu"], capability, flags=flags, depends=depends)


@functools.cache
def load(name: str, folder: Path | None, capability: str) -> Callable[..., int]:
    """The launch function of a candidate; see shims/*.cu. Raises like `build`."""
    function = getattr(ctypes.CDLL(str(build(name, folder, capability))), f"{name}_launch")
    addresses = {"official": 4, "dcnv4": 3}[name]
    function.argtypes = [
        *[ctypes.c_void_p] * addresses, ctypes.POINTER(ctypes.c_int), ctypes.c_float, ctypes.c_int, ctypes.c_void_p,
    ]  # fmt: skip
    return function


def official_call(launch: Callable[..., int], case: Dcnv3Case, operands: dict[str, torch.Tensor]) -> Call:
    """Enqueues the official kernel on PyTorch's current stream."""
    sizes = (ctypes.c_int * 5)(case.batch, case.height, case.width, case.groups, case.channels)
    tensors = [operands[name] for name in ("input", "offset", "mask", "output")]
    return _call("official", launch, tensors, sizes, case.offset_scale)


def dcnv4_call(
    launch: Callable[..., int], case: Dcnv3Case, operands: dict[str, torch.Tensor], per_thread: int, threads: int
) -> Call:
    """Enqueues DCNv4's kernel on PyTorch's current stream, with one of its settings."""
    joint = joined(case, operands)
    sizes = (ctypes.c_int * 8)(
        case.batch, case.height, case.width, case.groups, case.channels, per_thread, threads, joint.shape[-1]
    )
    return _call("dcnv4", launch, [operands["input"], joint, operands["output"]], sizes, case.offset_scale)


def _call(
    name: str, launch: Callable[..., int], tensors: list[torch.Tensor], sizes: ctypes.Array[ctypes.c_int], scale: float
) -> Call:
    import torch

    half = int(tensors[0].dtype == torch.float16)

    def call() -> None:
        addresses = [tensor.data_ptr() for tensor in tensors]  # here, so that the tensors live as long as the call
        status = launch(*addresses, sizes, scale, half, torch.cuda.current_stream().cuda_stream)
        if status:
            raise RuntimeError(f"{name}: CUDA error {status}")

    return call


def joined(case: Dcnv3Case, operands: dict[str, torch.Tensor]) -> torch.Tensor:
    """DCNv4's one operand: per group 18 offsets and 9 weights; the depth is padded to a multiple of 8."""
    import torch

    parts = [operands[name].unflatten(-1, (case.groups, -1)) for name in ("offset", "mask")]
    both = torch.cat(parts, -1).flatten(-2)
    padded = torch.nn.functional.pad(both, (0, math.ceil(both.shape[-1] / 8) * 8 - both.shape[-1]))
    return padded.contiguous()


def dcnv4_settings(case: Dcnv3Case, dtype: str) -> Iterator[tuple[int, int]]:
    """(channels of a thread, threads of a block) that DCNv4's own search tries and its kernel takes.

    A block covers a whole number of pixels, which must divide those of an image.
    """
    widest = 16 if dtype == "float16" else 8
    for per_thread in (2, 4, 8, 16):
        if per_thread > widest or case.channels % per_thread:
            continue
        of_a_pixel = case.groups * case.channels // per_thread
        for pixels in (1, 2, 4, 8, 16, 32, 64):
            if case.height * case.width % pixels == 0 and 32 <= of_a_pixel * pixels <= 1024:
                yield per_thread, of_a_pixel * pixels
