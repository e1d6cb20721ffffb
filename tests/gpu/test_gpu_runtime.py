# SPDX-License-Identifier: Apache-2.0
"""The device layer on a GPU, without TensorRT: an execution context that copies its input stands for an engine.

Each check runs on the stand-in for CUDA too.
"""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.context_pool import ContextPool
from internimage_deploy.runtime.gpu import driver, layers
from internimage_deploy.runtime.gpu.device import Device, DeviceBuffer, Event, Stream
from internimage_deploy.runtime.gpu.device_array import DeviceArray
from internimage_deploy.runtime.gpu.execution_context import ExecutionContext
from support import fake_cuda
from support.device_memory import from_device, to_device

LARGE = (1, 2048, 2048, 3)  # takes a while to copy, so that a missing wait shows


@pytest.fixture(
    params=["stand-in", pytest.param("driver", marks=pytest.mark.gpu), pytest.param("pycuda", marks=pytest.mark.gpu)]
)
def opened(request, monkeypatch):
    """A GPU, with each of the two implementations of the device layer, its context current."""
    if request.param == "stand-in":
        fake_cuda.install(monkeypatch, fake_cuda.make_driver())
    elif request.param == "driver":
        monkeypatch.setitem(sys.modules, "pycuda", None)
    else:
        pytest.importorskip("pycuda.driver")
    device = Device()
    assert device._layer.name == {"driver": layers.DriverLayer.name}.get(request.param, layers.PyCudaLayer.name)
    with device.current():
        yield device


class CopyingContext:
    """What `ExecutionContext` calls of TensorRT's; it copies the input to the output."""

    def __init__(self, device):
        self._device, self.addresses, self.enqueued, self.bound = device, {}, 0, 0

    def set_optimization_profile_async(self, profile_index, stream_handle):
        return profile_index == 0

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def infer_shapes(self):
        return []

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        self.bound += 1
        return True

    def execute_async_v3(self, stream_handle):
        self.enqueued += 1
        nbytes = int(np.prod(self.shape))
        self._device.call(
            "cuMemcpyDtoDAsync_v2", self.addresses["output"], self.addresses["input"], nbytes, stream_handle
        )
        return True


def copying(device, *, graphs=True):
    """An `ExecutionContext` that copies bytes."""
    return ExecutionContext(device, CopyingContext(device), ("input", "output"), "uint8", graphs, [])


def batch(seed, shape=(1, 64, 96, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_buffers_and_copies(opened):
    array = batch(0, LARGE)
    buffer = to_device(opened, array)
    assert driver.device_of(buffer.address) == opened.index
    np.testing.assert_array_equal(from_device(opened, buffer.address, np.zeros_like(array)), array)
    buffer.free()
    assert (buffer.address, buffer.capacity) == (0, 0)
    free, total = opened.memory()
    assert 0 < free <= total
    assert opened.name
    major, minor = map(int, opened.capability.split("."))
    assert major >= 3
    assert minor >= 0


def test_a_graph_is_captured_and_replayed(opened):
    context = copying(opened)
    for seed in range(6):
        context.start(batch(seed), 0)
        np.testing.assert_array_equal(context.finish(), batch(seed))
    assert (context.context.enqueued, context.context.bound) == (2, 2)  # plain, then captured, then replayed
    context.close()


def test_another_shape_captures_again(opened):
    context = copying(opened)
    for seed, side in enumerate((64, 64, 64, 128, 128, 128, 64, 64, 64)):
        array = batch(seed, (1, side, side, 3))
        context.start(array, 0)
        np.testing.assert_array_equal(context.finish(), array)
    assert context.context.enqueued == 6
    context.close()


def test_alternating_shapes_and_threads(opened):
    """Two batches in flight in each of four threads, three shapes in turn."""

    def work(number):
        made = []

        def create():
            made.append(copying(opened))
            return made[-1]

        with opened.current():
            pool = ContextPool(create, in_flight=2, limit=4, has_room=lambda: True)
            arrays = [batch(100 * number + index, (1, 64 + 64 * (index % 3), 96, 3)) for index in range(30)]
            numbers = [pool.start(array, 0) for array in arrays]
            for array, place in zip(arrays, numbers, strict=True):
                np.testing.assert_array_equal(pool.finish(place), array)
            enqueued = [context.context.enqueued for context in made]
            pool.close()
        return enqueued

    with ThreadPoolExecutor(4) as threads:
        for enqueued in threads.map(work, range(4)):
            assert enqueued == [2, 2, 2]  # each shape has its own context and graph


def test_parts_are_timed(opened):
    context = copying(opened)
    times = context.measure(batch(0, LARGE), 0)
    assert set(times) == {"h2d_ms", "infer_ms", "d2h_ms", "enqueue_ms"}
    assert min(times.values()) > 0
    context.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_arrays_on_the_gpu(graphs, opened):
    """What another stream still writes is waited for, and with `stream` that stream waits for the output."""
    context = copying(opened, graphs=graphs)
    side = Stream(opened)
    out = np.zeros(LARGE, np.uint8)
    for seed in range(4):
        array = batch(seed, LARGE)
        source = to_device(opened, array, side.handle)
        there = DeviceArray(source.address, array.shape, array.dtype, source, side.handle)
        output = context.run_on_device(there, 0)
        assert output.__cuda_array_interface__["stream"] is None
        np.testing.assert_array_equal(from_device(opened, output.address, out), array)
        if not graphs:
            assert context.context.addresses["input"] == source.address
        output = context.run_on_device(there, 0, stream=side.handle)
        assert output.__cuda_array_interface__["stream"] == side.handle
        np.testing.assert_array_equal(from_device(opened, output.address, out, side.handle), array)
        source.free()
    context.close()
    side.close()


def test_everything_is_given_back(opened):
    """Also by a thread that did not make it."""
    contexts = [copying(opened) for _ in range(3)]
    for context in contexts:
        for _ in range(3):
            context.start(batch(0, LARGE), 0)
            context.finish()
    used = opened.memory()[0]

    def close():
        with opened.current():
            for context in contexts:
                context.close()

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert opened.memory()[0] - used >= 6 * int(np.prod(LARGE))


def test_events_measure_time(opened):
    stream, first, second = Stream(opened), Event(opened, timed=True), Event(opened, timed=True)
    array = batch(0, LARGE)
    first.record(stream.handle)
    buffer = to_device(opened, array, stream.handle)
    second.record(stream.handle)
    second.synchronize()
    assert first.milliseconds_until(second) > 0
    buffer.free()
    for one in (first, second, stream):
        one.close()


@pytest.mark.gpu
def test_memory_that_cuda_does_not_know():
    array = np.zeros(16, np.uint8)
    interface = {"shape": (16,), "typestr": "|u1", "data": (array.ctypes.data, False), "version": 3}
    device = Device()
    with device.current(), pytest.raises(UserError, match="CUDA does not know the memory of the GPU array"):
        DeviceArray.of(SimpleNamespace(__cuda_array_interface__=interface))


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_other_libraries_on_streams_of_their_own(library):
    """Their arrays come in and go out without a copy and in the order of their streams."""
    other = pytest.importorskip(library)
    device = Device()
    if library == "torch":
        if not other.cuda.is_available():
            pytest.skip("needs a PyTorch with CUDA")
        stream = other.cuda.Stream()
        scope, handle = other.cuda.stream(stream), stream.cuda_stream

        def make(seed):
            return other.from_numpy(batch(seed, LARGE)).cuda(non_blocking=True)

        def read(output):
            return other.from_dlpack(output).cpu().numpy()
    else:
        scope = stream = other.cuda.Stream(non_blocking=True)
        handle = stream.ptr

        def make(seed):
            return other.asarray(batch(seed, LARGE))

        def read(output):
            return other.asnumpy(other.from_dlpack(output))

    for graphs in (False, True):
        with device.current():
            context = copying(device, graphs=graphs)
        with scope:
            for seed in range(6):
                array = make(seed) + 1  # computed on the side stream
                with device.current():
                    wanted = handle if seed % 2 else None
                    output = context.run_on_device(DeviceArray.of(array, device.index), 0, stream=wanted)
                assert output.__dlpack_device__() == (2, device.index)
                np.testing.assert_array_equal(read(output), batch(seed, LARGE) + 1)
        with device.current():
            context.close()


FAULT = """
.version 6.3
.target sm_75
.address_size 64
.visible .entry fault() {
  .reg .u64 %address;
  .reg .u32 %value;
  mov.u64 %address, 16;
  mov.u32 %value, 1;
  st.global.u32 [%address], %value;
  ret;
}
"""

DYING = f'''
import ctypes
from internimage_deploy.runtime.gpu import driver
from internimage_deploy.runtime.gpu.device import Device, DeviceBuffer, DeviceError, Stream
device = Device()
with device.current():
    stream, buffer = Stream(device), DeviceBuffer(device)
    buffer.reserve(100)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    cuda = driver.library()
    assert cuda.cuModuleLoadData(ctypes.byref(module), b"""{FAULT}""") == 0
    assert cuda.cuModuleGetFunction(ctypes.byref(function), module, b"fault") == 0
    nothing = ctypes.c_void_p()
    size = [ctypes.c_uint(number) for number in (1, 1, 1, 1, 1, 1, 0)]
    assert cuda.cuLaunchKernel(function, *size, ctypes.c_void_p(stream.handle), nothing, nothing) == 0
    for fails in (stream.synchronize, lambda: DeviceBuffer(device).reserve(100), buffer.free):
        try:
            fails()
        except DeviceError as error:
            print(error.code, error.sticky, error)
    print(driver.sticky_code())
'''


@pytest.mark.gpu
def test_an_illegal_access_is_sticky():
    """In a process of its own, which cannot use the GPU afterwards."""
    done = subprocess.run([sys.executable, "-c", DYING], capture_output=True, text=True, timeout=300, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) >= 3
    assert all(line.startswith("700 True") for line in lines[:-1])
    assert lines[-1] == "700"


def test_a_buffer_that_grows_keeps_to_its_address_until_then(opened):
    buffer = DeviceBuffer(opened)
    assert buffer.reserve(1000)
    address = buffer.address
    assert not buffer.reserve(500)
    assert buffer.address == address
    assert buffer.reserve(1 << 22)
    buffer.free()
