# SPDX-License-Identifier: Apache-2.0
"""The plugins' CUDA kernels as a library of its own, without TensorRT, for benchmarks and tests."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from internimage_deploy.cache import build_once, cache_folder, fingerprint, run_compiler
from internimage_deploy.trt_plugins.build import KERNEL_SOURCES, SOURCES
from internimage_deploy.trt_plugins.host_operators import DCNV3, MS_DEFORM_ATTN, UPSAMPLE_ARGMAX
from internimage_deploy.trt_plugins.toolchain import find_nvcc

HERE = Path(__file__).resolve().parent
LAUNCH = HERE / "launch.cpp"


def compile_cuda(
    name: str, sources: Sequence[Path], capability: str, *, flags: Sequence[str] = (), depends: Sequence[Path] = ()
) -> Path:
    """A shared library of CUDA sources for one compute capability, such as "9.0"; kept in the user's cache.

    The sources compile side by side.

    Args:
        name: of the library, for the cache.
        sources: .cu and .cpp files.
        capability: of the GPU that is to run it.
        flags: further options of the compiler, such as include folders.
        depends: files that the sources include.

    Raises:
        UserError: there is no nvcc, or it fails.
    """
    nvcc = find_nvcc()
    common = [str(nvcc.path), "-O3", "-Xcompiler", "-fPIC", f"-arch=sm_{capability.replace('.', '')}", *flags]
    key = fingerprint([*sources, *depends], [*common, nvcc.version])
    target = cache_folder() / "kernel" / f"{name}-{key}.so"

    def build(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            objects = [str(Path(folder) / f"{index}.o") for index in range(len(sources))]
            commands = [[*common, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
            logs = [target.with_name(f"{target.stem}-{source.stem}.log") for source in sources]
            list(pool.map(run_compiler, commands, logs))
            run_compiler([*common, "-shared", *objects, "-o", str(path)], target.with_suffix(".log"))

    build_once(target, build)
    return target


def load_kernel(capability: str) -> ctypes.CDLL:
    """The kernels for a GPU of compute capability `capability`, such as "8.6", compiled on the first call.

    Its functions are in launch.cpp: a `*_launch(params, dtype, tactic, stream)` for each kernel, which returns a CUDA
    error code, and more.

    Raises:
        UserError: there is no nvcc, or it fails.
    """
    headers = [path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cuh")]
    sources = [LAUNCH, *(SOURCES / name for name in KERNEL_SOURCES)]
    path = compile_cuda("kernels", sources, capability, flags=["-std=c++17", f"-I{SOURCES}"], depends=headers)
    library = ctypes.CDLL(str(path))
    for operator in (DCNV3, MS_DEFORM_ATTN, UPSAMPLE_ARGMAX):
        launch = getattr(library, f"{operator.prefix}_launch")
        launch.argtypes = [ctypes.POINTER(operator.params), ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    address, size = ctypes.c_void_p, ctypes.c_int64
    library.device_alloc.argtypes, library.device_alloc.restype = [size], address
    library.device_free.argtypes = [address]
    for copy in (library.device_upload, library.device_download):
        copy.argtypes = [address, address, size]
    return library
