# SPDX-License-Identifier: Apache-2.0
"""Arrays shared between libraries without a copy, through DLPack capsules (version 0.x of the C structures)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CPU, CUDA = 1, 2  # DLDeviceType

_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}  # NumPy kind -> DLDataTypeCode
_BFLOAT16_CODE = 4
_NAME = b"dltensor"
_USED_NAME = b"used_dltensor"


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter))

_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, _Destructor)
_api.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
# The same two functions for a capsule that is being destroyed, which must not be referenced again.
_is_valid_raw = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer_raw = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))

_alive: dict[int, object] = {}  # managed tensors that a consumer may still use, by address


@_Deleter
def _delete(managed: Any) -> None:
    _alive.pop(ctypes.addressof(managed.contents), None)


@_Destructor
def _destroy(capsule: int) -> None:
    # A capsule that nobody imported still has its first name: what it holds is released with it.
    if _is_valid_raw(capsule, _NAME):
        _alive.pop(_pointer_raw(capsule, _NAME), None)


def export_array(
    address: int, shape: tuple[int, ...], dtype: npt.DTypeLike, device: tuple[int, int], owner: object
) -> object:
    """A capsule over dense memory at `address`; `owner` is kept alive until the consumer releases it.

    Raises:
        TypeError: DLPack has no such element type.
    """
    element = np.dtype(dtype)
    if element.kind not in _KINDS:
        raise TypeError(f"DLPack has no element type {element}")
    sides = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed()
    managed.tensor = _Tensor(
        address, _Device(*device), len(shape), _DataType(_KINDS[element.kind], element.itemsize * 8, 1), sides, None, 0
    )
    managed.deleter = _delete
    _alive[ctypes.addressof(managed)] = (managed, sides, owner)
    capsule: object = _api.PyCapsule_New(ctypes.addressof(managed), _NAME, _destroy)
    return capsule


@dataclass
class ImportedArray:
    """Another library's array, released when this object is deleted."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: tuple[int, int]
    managed: Any

    def __del__(self) -> None:
        if self.managed.contents.deleter:
            self.managed.contents.deleter(self.managed)


def import_array(array: Any, stream: int | None = None) -> ImportedArray:
    """Import the array that `array.__dlpack__` exports.

    Args:
        array: another library's array.
        stream: handle of the CUDA stream on which it must be ready; None for an array in host memory. To leave it out
            means the default stream in the standard, and no waiting at all in PyTorch.

    Raises:
        ValueError: the array is not dense in C order, or its element type has no NumPy counterpart.
    """
    capsule = array.__dlpack__() if stream is None else array.__dlpack__(stream=stream)
    if not _api.PyCapsule_IsValid(capsule, _NAME):
        raise ValueError("the DLPack capsule is of a version that this program does not read, or was consumed before")
    managed = ctypes.cast(_api.PyCapsule_GetPointer(capsule, _NAME), ctypes.POINTER(_Managed))
    tensor = managed.contents.tensor
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        step = 1
        for axis in reversed(range(tensor.ndim)):
            if shape[axis] > 1 and tensor.strides[axis] != step:
                raise ValueError("the array is not dense in C order; make it contiguous first")
            step *= shape[axis]
    letters = {code: letter for letter, code in _KINDS.items()}
    if tensor.dtype.lanes != 1 or tensor.dtype.code not in letters:
        name = "bfloat16" if tensor.dtype.code == _BFLOAT16_CODE else f"DLPack code {tensor.dtype.code}"
        raise ValueError(f"the array's element type ({name}) has no NumPy counterpart")
    dtype = np.dtype(f"{letters[tensor.dtype.code]}{tensor.dtype.bits // 8}")
    _api.PyCapsule_SetName(capsule, _USED_NAME)
    address = (tensor.data or 0) + tensor.byte_offset
    return ImportedArray(address, shape, dtype, (tensor.device.type, tensor.device.id), managed)
