# SPDX-License-Identifier: Apache-2.0
"""Arrays on the GPU, shared with other libraries without a copy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.gpu import dlpack, driver
from internimage_deploy.runtime.gpu.driver import CudaError

if TYPE_CHECKING:
    from internimage_deploy.runtime.gpu.device import Device

READY = -1  # in the place of a stream: the content is ready, as in DLPack


class DeviceArray:
    """A dense array on a GPU, shared without a copy through `__cuda_array_interface__` and DLPack.

    Attributes:
        address: of the first element.
        owner: what keeps the memory alive.
        stream: handle of the stream on which the content becomes ready; `READY` where it is ready, None where that is
            not known.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        owner: object,
        stream: int | None = driver.LEGACY_STREAM,
        device: Device | None = None,
    ) -> None:
        """Wrap memory. `device` is needed for what is exported before it is ready."""
        self.address, self.shape, self.dtype = address, shape, np.dtype(dtype)
        self.owner, self.stream = owner, stream
        self._device = device

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def device_index(self) -> int:
        """The number of the GPU, as CUDA counts. Raises `UserError` if CUDA does not know the memory."""
        try:
            return driver.device_of(self.address)
        except CudaError as error:
            raise UserError(f"CUDA does not know the memory of the GPU array ({error.reason})") from error

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "strides": None,
            "stream": None if self.stream == READY else self.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device_index

    def __dlpack__(self, *, stream: int | None = None, **unused: object) -> object:
        consumer = stream or driver.LEGACY_STREAM
        if self._device is not None and self.stream is not None and READY not in (self.stream, consumer):
            with self._device.current():
                self._device.order(self.stream, consumer)
        return dlpack.export_array(self.address, self.shape, self.dtype, self.__dlpack_device__(), self)

    @staticmethod
    def of(array: Any, device: int = 0, stream: int | None = None) -> DeviceArray:
        """View another library's GPU array (PyTorch, CuPy, Numba, JAX) as one of ours.

        DLPack comes first: there the other library orders its streams. PyTorch's `__cuda_array_interface__` does not
        tell the stream that an array is computed on.

        Args:
            array: the other library's array.
            device: the number of the GPU on which the array is expected.
            stream: handle of the stream on which it is going to be read; None for the default stream.

        Raises:
            UserError: it offers neither interface, lies elsewhere, is not dense in C order, or NumPy has no such
                element type.
        """
        if isinstance(array, DeviceArray):
            found = array
        elif hasattr(array, "__dlpack__"):
            found = _from_dlpack(array, device, stream or driver.LEGACY_STREAM)
        elif (interface := getattr(array, "__cuda_array_interface__", None)) is not None:
            found = _from_interface(interface, array)
        else:
            raise UserError(
                f"got {type(array).__name__}, expected a GPU array with __cuda_array_interface__ or DLPack "
                "(PyTorch, CuPy, Numba, JAX)"
            )
        _check_device(found.device_index, device)
        return found


def _from_dlpack(array: Any, device: int, stream: int) -> DeviceArray:
    try:
        kind, index = array.__dlpack_device__()
        if kind == dlpack.CUDA:
            _check_device(index, device)  # the other library orders the streams of its own device
        imported = dlpack.import_array(array, stream if kind == dlpack.CUDA else None)
    except (ValueError, BufferError) as error:
        raise UserError(f"the array cannot be imported through DLPack: {error}") from error
    if imported.device[0] != dlpack.CUDA:
        raise UserError("the array is not on an NVIDIA GPU; pass CPU data as NumPy arrays")
    return DeviceArray(imported.address, imported.shape, imported.dtype, imported, stream)


def _from_interface(interface: dict[str, Any], array: object) -> DeviceArray:
    dtype = np.dtype(interface["typestr"])
    shape = tuple(int(side) for side in interface["shape"])
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != _dense_strides(shape, dtype.itemsize):
        raise UserError("the GPU array is not dense in C order; make it contiguous first")
    stream: int | None = None  # versions before 3 do not tell
    if interface.get("version", 0) >= 3:
        stream = READY if interface.get("stream") is None else int(interface["stream"])
    return DeviceArray(int(interface["data"][0]), shape, dtype, array, stream)


def _check_device(index: int, expected: int) -> None:
    if index != expected:
        raise UserError(
            f"the GPU array is on GPU {index}, and the model on GPU {expected}; copy the array there, or load the "
            f"model with device={index}"
        )


def _dense_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    step = itemsize
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))
