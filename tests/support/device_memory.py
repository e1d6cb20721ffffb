# SPDX-License-Identifier: Apache-2.0
"""Arrays in the memory of a GPU, and back."""

from internimage_deploy.runtime.gpu.device import DeviceBuffer, Stream


def to_device(device, array, stream=None):
    """A `DeviceBuffer` with a copy of `array`; its context must be current. With a stream handle nobody waits."""
    buffer = DeviceBuffer(device)
    buffer.reserve(max(array.nbytes, 1))
    _copy(device, "cuMemcpyHtoDAsync_v2", buffer.address, array.ctypes.data, array.nbytes, stream)
    return buffer


def from_device(device, address, array, stream=None):
    """Fill `array` with what lies at `address`, behind the work on a stream."""
    _copy(device, "cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, stream)
    if stream is not None:
        device.call("cuStreamSynchronize", stream)
    return array


def _copy(device, call, target, source, nbytes, stream):
    if stream is not None:
        device.call(call, target, source, nbytes, stream)
        return
    own = Stream(device)
    device.call(call, target, source, nbytes, own.handle)
    own.synchronize()
    own.close()
