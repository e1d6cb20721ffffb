# SPDX-License-Identifier: Apache-2.0
"""Context and memory of a GPU: through PyCUDA where it is installed, else through the driver's C API.

The context is the caller's where there is one, else the device's primary context, which PyTorch, CuPy and TensorRT use
as well, so that addresses can be handed from one to the other. Streams, events, copies and graphs are the C API's in
both cases: PyCUDA wraps neither streams of other libraries nor CUDA graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

from internimage_deploy.runtime.gpu import driver
from internimage_deploy.runtime.gpu.driver import CudaError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Layer(Protocol):
    """Context and memory of one GPU. Every method raises `CudaError`."""

    name: str

    def push(self) -> None:
        """Make the context current in this thread."""

    def pop(self) -> None:
        """Undo the latest `push` of this thread."""

    def allocate(self, nbytes: int) -> tuple[int, Callable[[], None]]:
        """Device memory: its address, and the function that frees it."""
        ...

    def allocate_pinned(self, nbytes: int) -> tuple[int, Callable[[], None]]:
        """Page-locked host memory: its address, and the function that frees it."""
        ...


class DriverLayer:
    """The driver's C API; see `Layer`."""

    name = "the driver's C API"

    def __init__(self, index: int) -> None:
        device = driver.number("cuDeviceGet", index)
        current = driver.new_handle("cuCtxGetCurrent")
        if current and driver.number("cuCtxGetDevice") == device:
            self._context = current
        else:
            self._context = driver.new_handle("cuDevicePrimaryCtxRetain", device)

    def push(self) -> None:
        driver.call("cuCtxPushCurrent_v2", self._context)

    def pop(self) -> None:
        driver.new_handle("cuCtxPopCurrent_v2")

    def allocate(self, nbytes: int) -> tuple[int, Callable[[], None]]:
        address = driver.new_handle("cuMemAlloc_v2", nbytes)
        return address, lambda: driver.call("cuMemFree_v2", address)

    def allocate_pinned(self, nbytes: int) -> tuple[int, Callable[[], None]]:
        address = driver.new_handle("cuMemHostAlloc", nbytes, 0)
        return address, lambda: driver.call("cuMemFreeHost", address)


class PyCudaLayer:
    """PyCUDA; see `Layer`. Its stack of contexts is kept, so that code which uses PyCUDA itself can be mixed in."""

    name = "PyCUDA"

    def __init__(self, pycuda: Any, index: int) -> None:
        self._pycuda = pycuda
        self._call("cuInit", pycuda.init)
        device = pycuda.Device(index)
        current = pycuda.Context.get_current()
        if current is not None and self._call("cuCtxGetDevice", pycuda.Context.get_device) == device:
            self._context = current
        else:
            self._context = self._call("cuDevicePrimaryCtxRetain", device.retain_primary_context)

    def push(self) -> None:
        self._call("cuCtxPushCurrent", self._context.push)

    def pop(self) -> None:
        self._call("cuCtxPopCurrent", self._pycuda.Context.pop)

    def allocate(self, nbytes: int) -> tuple[int, Callable[[], None]]:
        allocation = self._call("cuMemAlloc", self._pycuda.mem_alloc, nbytes)
        return int(allocation), lambda: self._call("cuMemFree", allocation.free)

    def allocate_pinned(self, nbytes: int) -> tuple[int, Callable[[], None]]:
        array = self._call("cuMemHostAlloc", self._pycuda.pagelocked_empty, (nbytes,), np.uint8)
        return int(array.ctypes.data), lambda: self._call("cuMemFreeHost", array.base.free)

    def _call(self, name: str, function: Callable[..., Result], *arguments: object) -> Result:
        """`function(*arguments)`. PyCUDA's exceptions have no code, so the driver is asked for it."""
        try:
            return function(*arguments)
        except self._pycuda.MemoryError as error:
            raise CudaError(name, driver.OUT_OF_MEMORY) from error
        except self._pycuda.Error as error:
            raise CudaError(name, driver.sticky_code(), str(error).partition(" failed: ")[2] or str(error)) from error


def open_layer(index: int) -> Layer:
    """Context and memory of the GPU number `index`. Raises `CudaError`."""
    try:
        import pycuda.driver as pycuda
    except ImportError as error:
        if getattr(error, "name", None) not in ("pycuda", "pycuda.driver"):  # installed, for another CUDA or Python
            log.warning("PyCUDA does not load (%s); the NVIDIA driver is called without it", error)
        return DriverLayer(index)
    return PyCudaLayer(pycuda, index)
