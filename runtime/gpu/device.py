# SPDX-License-Identifier: Apache-2.0
"""The device layer: context, streams, events and reused buffers, over PyCUDA.

The context is the caller's where there is one, else the device's primary context, which PyTorch, CuPy and TensorRT use
as well, so that addresses can be handed from one to the other. Every failure names the call; the context is popped
whatever happens, so the device stays usable.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime.gpu.driver import gpu_problem

Result = TypeVar("Result")
Value = TypeVar("Value")


class DeviceError(RuntimeError):
    """A call to the GPU failed, and not through a mistake of the user; the message names the call."""


class OutOfDeviceMemory(UserError):
    """The GPU has too little free memory for a batch, a model or a buffer."""


def driver() -> Any:
    """The module `pycuda.driver`, initialised.

    Raises:
        MissingDependency: PyCUDA is not installed.
        UserError: there is no usable GPU here.
    """
    try:
        import pycuda.driver as drv
    except ImportError as error:
        if problem := gpu_problem():  # PyCUDA would not help
            raise UserError(f"running an engine needs an NVIDIA GPU: {problem}") from error
        if getattr(error, "name", "") and str(error.name).startswith("pycuda"):
            raise MissingDependency("pycuda", None, "running an engine") from error
        raise UserError(f"PyCUDA does not load ({error}); is the NVIDIA driver installed?") from error
    try:
        drv.init()
    except drv.Error as error:
        raise UserError(
            f"the NVIDIA driver does not start ({error}); is there a GPU, and may this user open it?"
        ) from error
    return drv


def device_name(index: int = 0) -> str:
    """The name of a GPU. Raises like `driver`."""
    return str(driver().Device(index).name())


class Device:
    """A GPU and the context on it."""

    def __init__(self, index: int = 0) -> None:
        self.driver = driver()
        count = self.driver.Device.count()
        if index >= count:
            raise UserError(f"no GPU number {index}: this machine has {count}")
        self.handle = self.driver.Device(index)
        self.name = str(self.handle.name())
        major, minor = self.handle.compute_capability()
        self.capability = f"{major}.{minor}"
        current = self.driver.Context.get_current()
        if current is not None and self.call("cuCtxGetDevice", self.driver.Context.get_device) == self.handle:
            self._context = current
        else:
            self._context = self.call("cuDevicePrimaryCtxRetain", self.handle.retain_primary_context)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread for the duration of a `with` block."""
        self.call("cuCtxPushCurrent", self._context.push)
        try:
            yield
        finally:
            self.driver.Context.pop()

    def call(self, name: str, function: Callable[..., Result], *arguments: object) -> Result:
        """`function(*arguments)`; a failure becomes an error that names the call.

        Raises:
            OutOfDeviceMemory: the GPU's memory is used up.
            DeviceError: anything else.
        """
        try:
            return function(*arguments)
        except self.driver.MemoryError as error:
            raise OutOfDeviceMemory(
                f"{name}: the GPU {self.name} is out of memory; use a smaller batch or image, or free some memory"
            ) from error
        except self.driver.Error as error:
            raise DeviceError(f"{name} failed on {self.name}: {error}") from error

    def stream(self) -> Any:
        """A new stream that does not wait for the default stream."""
        flags = getattr(getattr(self.driver, "stream_flags", None), "NON_BLOCKING", 1)
        try:
            return self.call("cuStreamCreate", self.driver.Stream, flags)
        except TypeError:  # a PyCUDA whose streams take no flags
            return self.call("cuStreamCreate", self.driver.Stream)

    def event(self, timed: bool = False) -> Any:
        """A new event; untimed ones are cheaper."""
        return self.call("cuEventCreate", self.driver.Event, 0 if timed else self.driver.event_flags.DISABLE_TIMING)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the GPU."""
        with self.current():
            free, total = self.call("cuMemGetInfo", self.driver.mem_get_info)
        return int(free), int(total)


class DeviceBuffer:
    """Device memory that is reused and grows when a larger size is needed."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._allocation: Any = None
        self.capacity = 0

    @property
    def address(self) -> int:
        """Device address of the memory, 0 for an empty buffer; it changes when the buffer grows."""
        return int(self._allocation) if self._allocation is not None else 0

    def reserve(self, nbytes: int) -> bool:
        """Make room for `nbytes`, losing the content if that takes new memory; True if the address changed."""
        if nbytes <= self.capacity:
            return False
        self.free()
        name = f"cuMemAlloc of {nbytes / 1e6:.1f} MB"
        self._allocation = self._device.call(name, self._device.driver.mem_alloc, nbytes)
        self.capacity = nbytes
        return True

    def free(self) -> None:
        """Free the memory; the buffer is empty afterwards."""
        if self._allocation is not None:
            self._allocation.free()
        self._allocation, self.capacity = None, 0


class PinnedBuffer:
    """Page-locked host memory, for asynchronous copies; it grows and is reused like `DeviceBuffer`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._bytes: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def view(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array over the buffer; the next `view` shares its memory."""
        element = np.dtype(dtype)
        nbytes = math.prod(shape) * element.itemsize
        if nbytes > self._bytes.size:
            name = f"cuMemHostAlloc of {nbytes / 1e6:.1f} MB"
            self._bytes = self._device.call(name, self._device.driver.pagelocked_empty, (nbytes,), np.uint8)
        return self._bytes[:nbytes].view(element).reshape(shape)


class DeviceArray:
    """A dense array on the GPU, shared without a copy through `__cuda_array_interface__` and DLPack.

    `owner` keeps the memory alive; `stream` is the stream on which its content becomes ready.
    """

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike, owner: object, stream: int = 0
    ) -> None:
        self.address, self.shape, self.dtype = address, shape, np.dtype(dtype)
        self.owner, self.stream = owner, stream

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": self.stream or None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        from internimage_deploy.runtime.gpu.dlpack import CUDA

        return CUDA, 0

    def __dlpack__(self, *, stream: int | None = None, **unused: object) -> object:
        from internimage_deploy.runtime.gpu.dlpack import CUDA, export_array

        return export_array(self.address, self.shape, self.dtype, (CUDA, 0), self)

    @staticmethod
    def of(array: Any) -> DeviceArray:
        """View another library's GPU array (PyTorch, CuPy, Numba, JAX) as one of ours.

        Raises:
            UserError: it offers neither interface, is not dense in C order, or NumPy has no such element type.
        """
        if isinstance(array, DeviceArray):
            return array
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is not None:
            dtype = np.dtype(interface["typestr"])
            shape = tuple(int(side) for side in interface["shape"])
            strides = interface.get("strides")
            if strides is not None and tuple(strides) != _dense_strides(shape, dtype.itemsize):
                raise UserError("the GPU array is not dense in C order; make it contiguous first")
            return DeviceArray(int(interface["data"][0]), shape, dtype, array, int(interface.get("stream") or 0))
        if hasattr(array, "__dlpack__"):
            from internimage_deploy.runtime.gpu.dlpack import CUDA, import_array

            try:
                imported = import_array(array)
            except (ValueError, BufferError) as error:
                raise UserError(f"the array cannot be imported through DLPack: {error}") from error
            if imported.device[0] != CUDA:
                raise UserError("the array is not on an NVIDIA GPU; pass CPU data as NumPy arrays")
            return DeviceArray(imported.address, imported.shape, imported.dtype, imported)
        raise UserError(
            f"got {type(array).__name__}, expected a GPU array with __cuda_array_interface__ or DLPack "
            "(PyTorch, CuPy, Numba, JAX)"
        )


def _dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    step = itemsize
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))


class PerThread(Generic[Value]):
    """One object per thread, made on first use."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._local = threading.local()
        self._all: list[Value] = []
        self._lock = threading.Lock()

    def get(self) -> Value:
        """This thread's object."""
        if not hasattr(self._local, "value"):
            self._local.value = self._make()
            with self._lock:
                self._all.append(self._local.value)
        value: Value = self._local.value
        return value

    def drop(self) -> None:
        """Forget this thread's object, so that `get` makes a new one, as after a failure."""
        value = self._local.__dict__.pop("value", None)
        with self._lock:
            self._all = [other for other in self._all if other is not value]

    def clear(self) -> list[Value]:
        """Forget the objects of all threads and return them."""
        with self._lock:
            values, self._all = self._all, []
        self._local = threading.local()
        return values
