# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA driver's C API: the calls that the device layer makes, and whether there is a GPU that can be used.

The driver keeps these functions as they are for programs that were built for an older CUDA, so neither a CUDA toolkit
nor a package for one version of it is needed.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from typing import Any

# CUdevice is an int, CUdeviceptr a 64-bit address; contexts, streams, events and graphs are pointers.
_HANDLE, _ADDRESS, _TO_HANDLE = c_void_p, c_void_p, POINTER(c_void_p)

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_TO_HANDLE, c_int),
    "cuCtxGetCurrent": (_TO_HANDLE,),
    "cuCtxGetDevice": (POINTER(c_int),),
    "cuCtxPushCurrent_v2": (_HANDLE,),
    "cuCtxPopCurrent_v2": (_TO_HANDLE,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (_TO_HANDLE, c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemHostAlloc": (_TO_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (_ADDRESS, c_void_p, c_size_t, _HANDLE),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _ADDRESS, c_size_t, _HANDLE),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, c_size_t, _HANDLE),
    "cuPointerGetAttribute": (c_void_p, c_int, _ADDRESS),
    "cuStreamCreate": (_TO_HANDLE, c_uint),
    "cuStreamDestroy_v2": (_HANDLE,),
    "cuStreamSynchronize": (_HANDLE,),
    "cuStreamQuery": (_HANDLE,),
    "cuStreamWaitEvent": (_HANDLE, _HANDLE, c_uint),
    "cuStreamBeginCapture_v2": (_HANDLE, c_int),
    "cuStreamEndCapture": (_HANDLE, _TO_HANDLE),
    "cuEventCreate": (_TO_HANDLE, c_uint),
    "cuEventDestroy_v2": (_HANDLE,),
    "cuEventRecord": (_HANDLE, _HANDLE),
    "cuEventSynchronize": (_HANDLE,),
    "cuEventElapsedTime": (POINTER(c_float), _HANDLE, _HANDLE),
    "cuGraphInstantiateWithFlags": (_TO_HANDLE, _HANDLE, ctypes.c_ulonglong),
    "cuGraphDestroy": (_HANDLE,),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphExecDestroy": (_HANDLE,),
}
"""Argument types of the driver's functions, by exported name; each returns a CUresult."""

SUCCESS, OUT_OF_MEMORY = 0, 2
STREAM_NON_BLOCKING = 1
EVENT_WITH_TIME, EVENT_WITHOUT_TIME = 0, 2
CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
LEGACY_STREAM, PER_THREAD_STREAM = 1, 2  # handles of CUDA's two default streams
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
POINTER_DEVICE_ORDINAL = 9

STICKY = frozenset({4, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810})
"""CUresult codes after which no call succeeds any more in this process; cuda.h says so of most of them.

The others: 4 (the driver shuts down), 214 and 220 (uncorrectable ECC and NVLink errors), 709 (the context is destroyed)
and 710 (an assertion failed on the GPU).
"""


class CudaError(Exception):
    """A call to the driver failed.

    Attributes:
        call: name of the function.
        code: its CUresult.
        reason: the driver's description of the code.
    """

    def __init__(self, call: str, code: int, reason: str = "") -> None:
        self.call = call.removesuffix("_v2")
        self.code = code
        self.reason = reason or _description(code)
        super().__init__(f"{self.call} failed: {self.reason}")


@cache
def library() -> Any:
    """The driver's library with the functions of `SIGNATURES`.

    Raises:
        OSError: no NVIDIA driver is installed.
        AttributeError: the driver is older than CUDA 11.4 and lacks a function.
    """
    loaded = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, c_int
    return loaded


def call(name: str, *arguments: Any) -> None:
    """Call a function of `SIGNATURES`. Raises `CudaError` if it does not return CUDA_SUCCESS."""
    if code := getattr(library(), name)(*arguments):
        raise CudaError(name, code)


def new_handle(name: str, *arguments: Any) -> int:
    """Call a function that stores a handle or an address in its first argument, and return that. Raises `CudaError`."""
    handle = c_void_p()
    call(name, ctypes.byref(handle), *arguments)
    return handle.value or 0


def number(name: str, *arguments: Any) -> int:
    """Call a function that stores an int in its first argument, and return that. Raises `CudaError`."""
    value = c_int()
    call(name, ctypes.byref(value), *arguments)
    return value.value


def sticky_code() -> int:
    """The error that has ended the current context for good, 0 where it is as usable as before."""
    code = int(library().cuStreamQuery(LEGACY_STREAM))
    return code if code in STICKY else 0


def device_of(address: int) -> int:
    """The number of the GPU that holds the memory at `address`. Raises `CudaError` if CUDA does not know it."""
    ordinal = c_int()
    call("cuPointerGetAttribute", ctypes.byref(ordinal), POINTER_DEVICE_ORDINAL, address)
    return ordinal.value


def gpu_problem() -> str:
    """What is wrong where the NVIDIA driver sees no GPU, else empty. Needs the driver only, no CUDA toolkit."""
    try:
        code = library().cuInit(0)
    except OSError:
        return "no NVIDIA driver is installed here"
    except AttributeError as error:
        return f"the NVIDIA driver is too old, it is of a CUDA before 11.4 ({error})"
    if code:
        return f"the NVIDIA driver does not start (cuInit returned {code})"
    try:
        return "" if number("cuDeviceGetCount") else "the NVIDIA driver sees no GPU"
    except CudaError as error:
        return f"the NVIDIA driver sees no GPU ({error.reason})"


def _description(code: int) -> str:
    text = c_char_p()
    if library().cuGetErrorString(code, ctypes.byref(text)) or not text.value:
        return f"error {code}"
    return f"{text.value.decode()} (error {code})"
