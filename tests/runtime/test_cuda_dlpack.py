# SPDX-License-Identifier: Apache-2.0
"""DLPack and the CUDA array interface, against NumPy and PyTorch on host memory."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.gpu import dlpack
from internimage_deploy.runtime.gpu.device_array import DeviceArray
from support import fake_cuda


class Exported:
    """An array on the CPU that goes out through our capsule."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return dlpack.CPU, 0

    def __dlpack__(self, *, stream=None, **unused):
        return dlpack.export_array(self.array.ctypes.data, self.array.shape, self.array.dtype, (dlpack.CPU, 0), self)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float16", "float32", "bool"])
def test_numpy_reads_what_we_export(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    np.testing.assert_array_equal(np.from_dlpack(Exported(array)), array)


def test_pytorch_reads_what_we_export():
    torch = pytest.importorskip("torch")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = torch.from_dlpack(Exported(array))
    tensor += 1  # the same memory
    np.testing.assert_array_equal(array, np.arange(1, 7).reshape(2, 3))


def test_the_owner_lives_as_long_as_its_reader():
    exported = Exported(np.ones(3, np.float32))
    alive = weakref.ref(exported)
    view = np.from_dlpack(exported)
    del exported
    gc.collect()
    assert alive() is not None
    del view
    gc.collect()
    assert alive() is None


def test_a_capsule_that_nobody_takes_frees_its_owner():
    exported = Exported(np.ones(3, np.float32))
    alive = weakref.ref(exported)
    capsule = exported.__dlpack__()
    del exported, capsule
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "bool"])
def test_we_read_what_numpy_exports(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    imported = dlpack.import_array(array)
    assert (imported.address, imported.shape, imported.dtype) == (array.ctypes.data, (2, 3), np.dtype(dtype))
    assert imported.device[0] == dlpack.CPU


def test_strided_arrays_are_refused():
    with pytest.raises(ValueError, match="not dense in C order"):
        dlpack.import_array(np.zeros((4, 4))[:, ::2])


def test_bfloat16_is_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="bfloat16"):
        dlpack.import_array(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="DLPack has no element type"):
        dlpack.export_array(0, (1,), "datetime64[s]", (dlpack.CPU, 0), None)


def test_dlpack_mistakes_are_the_users():
    with pytest.raises(UserError, match="not dense in C order; make it contiguous first"):
        DeviceArray.of(np.zeros((4, 4))[:, ::2])
    locked = np.zeros(4)
    locked.flags.writeable = False  # NumPy raises BufferError
    with pytest.raises(UserError, match="cannot be imported through DLPack"):
        DeviceArray.of(locked)


def interface(**changes):
    interface = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 3, "strides": None} | changes
    return SimpleNamespace(__cuda_array_interface__=interface)


def test_the_array_interface_of_others(monkeypatch):
    fake_cuda.install(monkeypatch, fake_cuda.make_driver())
    array = DeviceArray.of(interface(strides=(12, 4), stream=7))
    assert (array.address, array.shape, array.dtype, array.nbytes, array.stream) == (4096, (2, 3), np.float32, 24, 7)
    assert DeviceArray.of(array) is array
    with pytest.raises(UserError, match="not dense in C order; make it contiguous first"):
        DeviceArray.of(interface(strides=(4, 8)))
    with pytest.raises(UserError, match="got list, expected a GPU array"):
        DeviceArray.of([1])
    with pytest.raises(UserError, match="not on an NVIDIA GPU; pass CPU data as NumPy arrays"):
        DeviceArray.of(np.zeros(3))
