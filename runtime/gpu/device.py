# SPDX-License-Identifier: Apache-2.0
"""The device layer: a GPU with its context, streams, events and reused buffers.

Every failure names the call; the context is popped whatever happens, so the device stays usable. Everything is freed by
`close` or `free`, with the context current: left to the garbage collector, which runs in any thread, it would leak.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.gpu import driver
from internimage_deploy.runtime.gpu.driver import CudaError, gpu_problem
from internimage_deploy.runtime.gpu.layers import open_layer

Result = TypeVar("Result")


class DeviceError(RuntimeError):
    """A call to the GPU failed, and not through a mistake of the user; the message names the call.

    Attributes:
        code: CUresult of the driver, 0 where it is not known.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    @property
    def sticky(self) -> bool:
        """True when no call succeeds any more in this process: only a new one can use the GPU again."""
        return self.code in driver.STICKY


class OutOfDeviceMemory(UserError):
    """The GPU has too little free memory for a batch, a model or a buffer."""


def device_name(index: int = 0) -> str:
    """The name of a GPU. Raises `UserError` where there is no usable GPU of that number."""
    return Device(index).name


class Device:
    """A GPU and the context on it.

    Attributes:
        index: its number, as CUDA counts.
        name: such as "NVIDIA GeForce RTX 4090".
        capability: compute capability, such as "8.9".
    """

    def __init__(self, index: int = 0) -> None:
        """Open the GPU number `index`. Raises `UserError` where there is no usable GPU of that number."""
        if problem := gpu_problem():
            raise UserError(f"running an engine needs an NVIDIA GPU: {problem}")
        self.index, self.name = index, f"GPU {index}"
        count = self._translate(None, driver.number, "cuDeviceGetCount")
        if not 0 <= index < count:
            raise UserError(f"no GPU number {index}: this machine has {count}")
        handle = self._translate(None, driver.number, "cuDeviceGet", index)
        name = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", name, len(name), handle)
        self.name = name.value.decode()
        attributes = (driver.COMPUTE_CAPABILITY_MAJOR, driver.COMPUTE_CAPABILITY_MINOR)
        numbers = (self._translate(None, driver.number, "cuDeviceGetAttribute", kind, handle) for kind in attributes)
        self.capability = ".".join(map(str, numbers))
        self._layer = self._translate(None, open_layer, index)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread for the duration of a `with` block."""
        self._translate(None, self._layer.push)
        try:
            yield
        finally:
            self._translate(None, self._layer.pop)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver, by a name of `driver.SIGNATURES`.

        Raises:
            OutOfDeviceMemory: the GPU's memory is used up.
            DeviceError: anything else.
        """
        self._translate(None, driver.call, name, *arguments)

    def new_handle(self, name: str, *arguments: Any) -> int:
        """As `call`, for a function that stores a handle in its first argument; returns the handle."""
        return self._translate(None, driver.new_handle, name, *arguments)

    def allocate(self, nbytes: int, *, pinned: bool = False) -> tuple[int, Callable[[], None]]:
        """Memory on the GPU, or page-locked on the host: its address, and what frees it. Raises like `call`."""
        name, function = (
            ("cuMemHostAlloc", self._layer.allocate_pinned) if pinned else ("cuMemAlloc", self._layer.allocate)
        )
        address, free = self._translate(f"{name} of {nbytes / 1e6:.1f} MB", function, nbytes)
        return address, lambda: self._translate(None, free)

    def order(self, before: int, after: int) -> None:
        """Let later work on the stream `after` wait, on the GPU, for the present work on the stream `before`."""
        event = Event(self)
        try:
            event.record(before)
            self.call("cuStreamWaitEvent", after, event.handle, 0)
        finally:
            event.close()  # the driver keeps what the wait needs

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self.current():
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _translate(self, name: str | None, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(*arguments)`; a failure of the driver becomes an error that names the call."""
        try:
            return function(*arguments)
        except CudaError as error:
            if error.code == driver.OUT_OF_MEMORY:
                raise OutOfDeviceMemory(
                    f"{name or error.call}: the GPU {self.name} is out of memory; use a smaller batch or image, or "
                    "free some memory"
                ) from error
            raise DeviceError(f"{name or error.call} failed on {self.name}: {error.reason}", error.code) from error


class Stream:
    """A stream that does not wait for the default stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.handle = device.new_handle("cuStreamCreate", driver.STREAM_NON_BLOCKING)

    def synchronize(self) -> None:
        """Wait for the work on the stream."""
        self._device.call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        """Free the stream."""
        self._device.call("cuStreamDestroy_v2", self.handle)


class Event:
    """A mark on a stream; untimed ones are cheaper."""

    def __init__(self, device: Device, *, timed: bool = False) -> None:
        self._device = device
        flags = driver.EVENT_WITH_TIME if timed else driver.EVENT_WITHOUT_TIME
        self.handle = device.new_handle("cuEventCreate", flags)

    def record(self, stream: int) -> None:
        """Mark the place that the stream with the handle `stream` has reached."""
        self._device.call("cuEventRecord", self.handle, stream)

    def synchronize(self) -> None:
        """Wait for the marked place."""
        self._device.call("cuEventSynchronize", self.handle)

    def milliseconds_until(self, later: Event) -> float:
        """Time between two timed events that both have happened."""
        milliseconds = ctypes.c_float()
        self._device.call("cuEventElapsedTime", ctypes.byref(milliseconds), self.handle, later.handle)
        return milliseconds.value

    def close(self) -> None:
        """Free the event."""
        self._device.call("cuEventDestroy_v2", self.handle)


class DeviceBuffer:
    """Memory on the GPU that is reused and grows when a larger size is needed."""

    pinned = False

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: Callable[[], None] = lambda: None
        self.address = 0  # 0 for an empty buffer; it changes when the buffer grows
        self.capacity = 0  # bytes

    def reserve(self, nbytes: int) -> bool:
        """Make room for `nbytes`, losing the content if that takes new memory; True if the address changed."""
        if nbytes <= self.capacity:
            return False
        self.free()
        self.address, self._free = self._device.allocate(nbytes, pinned=self.pinned)
        self.capacity = nbytes
        return True

    def free(self) -> None:
        """Free the memory; the buffer is empty afterwards."""
        free, self._free = self._free, lambda: None
        self.address = self.capacity = 0
        free()


class PinnedBuffer(DeviceBuffer):
    """Page-locked host memory, for asynchronous copies."""

    pinned = True

    def view(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array over the buffer, until it is freed; the next `view` shares its memory."""
        element = np.dtype(dtype)
        nbytes = math.prod(shape) * element.itemsize
        self.reserve(nbytes)
        memory = (ctypes.c_uint8 * nbytes).from_address(self.address)
        return np.frombuffer(memoryview(memory), element).reshape(shape)
