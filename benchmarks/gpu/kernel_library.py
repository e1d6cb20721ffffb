# SPDX-License-Identifier: Apache-2.0
"""The plugins' CUDA kernels as a library of its own, without TensorRT, for benchmarks and tests."""

from __future__ import annotations

import ctypes
from pathlib import Path

from internimage_deploy.cache import build_once, cache_folder, fingerprint, run_compiler
from internimage_deploy.trt_plugins import host
from internimage_deploy.trt_plugins.build import KERNEL_SOURCES, SOURCES
from internimage_deploy.trt_plugins.toolchain import find_nvcc

LAUNCH = Path(__file__).resolve().with_name("launch.cpp")


def load_kernel(capability: str) -> ctypes.CDLL:
    """The library for a GPU of compute capability `capability`, such as "8.6", compiled on the first call.

    Its functions are `dcnv3_launch(params, dtype, tactic, stream)`, and `ms_deform_attn_launch` and
    `upsample_argmax_launch` with the same arguments, which return a CUDA error code, and `dcnv3_tactics()`; see
    launch.cpp.

    Raises:
        UserError: there is no nvcc, or it fails.
    """
    nvcc = find_nvcc()
    command = [
        *(str(nvcc.path), "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC"),
        *(f"-arch=sm_{capability.replace('.', '')}", f"-I{SOURCES}", str(LAUNCH)),
        *(str(SOURCES / name) for name in KERNEL_SOURCES),
    ]
    headers = (path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cuh"))
    key = fingerprint([*headers, *(SOURCES / name for name in KERNEL_SOURCES), LAUNCH], [*command, nvcc.version])
    target = cache_folder() / "kernel" / f"dcnv3-{key}.so"
    build_once(target, lambda path: run_compiler([*command, "-o", str(path)], target.with_suffix(".log")))
    library = ctypes.CDLL(str(target))
    for launch, params in (
        (library.dcnv3_launch, host.Params),
        (library.ms_deform_attn_launch, host.MsDeformAttnParams),
        (library.upsample_argmax_launch, host.UpsampleArgmaxParams),
    ):
        launch.argtypes = [ctypes.POINTER(params), ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    return library
