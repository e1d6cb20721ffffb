# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for `pycuda.driver` and cuda-python's runtime: the documented names and arguments, over host memory.

"Device" memory is host memory at real addresses. What is put on a stream is done only when somebody waits for it, so
that a missing wait, or a buffer that is used again too early, changes the output.
"""

import ctypes
import itertools
import sys
import time
from types import ModuleType, SimpleNamespace

import numpy as np

STREAMS = {}
_handles = itertools.count(1000)


class Error(Exception):
    pass


class MemoryError_(Error):
    pass


class Stream:
    def __init__(self, flags=0):
        assert isinstance(flags, int)
        self.queue = []
        self.handle = next(_handles)
        self.captured = None
        STREAMS[self.handle] = self

    def put(self, work):
        (self.queue if self.captured is None else self.captured).append(work)

    def synchronize(self):
        if self.captured is not None:
            raise Error("operation not permitted when stream is capturing")
        while self.queue:
            self.queue.pop(0)()

    def wait_for_event(self, event):
        assert isinstance(event, Event)
        self.put(event.synchronize)


class Event:
    def __init__(self, flags=0):
        assert isinstance(flags, int)
        self._stream, self._place = None, 0

    def record(self, stream=None):
        assert isinstance(stream, Stream)
        self.done = False
        self._stream = stream
        stream.put(self._mark)
        return self

    def _mark(self):
        self.done, self.at = True, time.perf_counter()

    def time_till(self, event):
        return (event.at - self.at) * 1e3

    def synchronize(self):
        while not self.done:
            self._stream.queue.pop(0)()
        return self


class Allocation:
    def __init__(self, driver, nbytes):
        self._driver, self._bytes = driver, (ctypes.c_uint8 * nbytes)()
        driver.used += nbytes

    def __int__(self):
        return ctypes.addressof(self._bytes)

    def free(self):
        assert self._bytes is not None, "freed twice"
        self._driver.used -= len(self._bytes)
        self._bytes = None


def make_driver(*, memory=1 << 30, capability=(8, 6), devices=1):
    """A `pycuda.driver` with GPUs of so much memory."""
    driver = ModuleType("pycuda.driver")
    driver.used = 0
    driver.stack = []
    driver.primary = SimpleNamespace(push=lambda: driver.stack.append(driver.primary))

    def needs_context():
        if not driver.stack:
            raise Error("cuMemAlloc failed: invalid device context")

    class Device:
        def __init__(self, number):
            assert 0 <= number < devices

        count = staticmethod(lambda: devices)

        def name(self):
            return "Stand-in GPU"

        def compute_capability(self):
            return capability

        def retain_primary_context(self):
            return driver.primary

    class Context:
        @staticmethod
        def pop():
            driver.stack.pop()

        @staticmethod
        def get_current():
            return driver.stack[-1] if driver.stack else None

        @staticmethod
        def get_device():
            return Device(0)

        @staticmethod
        def synchronize():
            for stream in list(STREAMS.values()):
                stream.synchronize()

    def mem_alloc(nbytes):
        needs_context()
        if driver.used + nbytes > memory:
            raise MemoryError_("cuMemAlloc failed: out of memory")
        return Allocation(driver, nbytes)

    def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
        needs_context()
        return np.empty(shape, dtype, order)

    def copy(target, source, nbytes, stream):
        needs_context()
        assert isinstance(stream, Stream)
        stream.put(lambda: ctypes.memmove(target(), source(), nbytes))

    def memcpy_htod_async(dest, src, stream=None):
        assert src.flags.c_contiguous
        copy(lambda: dest, lambda: src.ctypes.data, src.nbytes, stream)

    def memcpy_dtoh_async(dest, src, stream=None):
        assert dest.flags.c_contiguous
        copy(lambda: dest.ctypes.data, lambda: src, dest.nbytes, stream)

    def memcpy_dtod_async(dest, src, size, stream=None):
        copy(lambda: dest, lambda: src, size, stream)

    driver.init = lambda: None
    driver.Error, driver.MemoryError = Error, MemoryError_
    driver.Device, driver.Context, driver.Stream, driver.Event = Device, Context, Stream, Event
    driver.stream_flags = SimpleNamespace(NON_BLOCKING=1)
    driver.event_flags = SimpleNamespace(DISABLE_TIMING=2)
    driver.mem_get_info = lambda: (memory - driver.used, memory)
    driver.mem_alloc, driver.pagelocked_empty = mem_alloc, pagelocked_empty
    driver.memcpy_htod_async, driver.memcpy_dtoh_async = memcpy_htod_async, memcpy_dtoh_async
    driver.memcpy_dtod_async = memcpy_dtod_async
    return driver


def make_runtime(*, capturable=True):
    """A `cuda.bindings.runtime` with what capturing a graph takes; counts launches."""
    runtime = ModuleType("cuda.bindings.runtime")
    success, failure = "cudaSuccess", "cudaErrorStreamCaptureUnsupported"
    runtime.cudaError_t = SimpleNamespace(cudaSuccess=success)
    runtime.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    runtime.captured, runtime.launched, runtime.freed = 0, 0, 0

    def begin(stream, mode):
        assert mode == 1
        if not capturable:
            return (failure,)
        assert not STREAMS[stream].queue, "capturing begins on a stream at rest"
        STREAMS[stream].captured = []
        return (success,)

    def end(stream):
        work, STREAMS[stream].captured = STREAMS[stream].captured, None
        runtime.captured += 1
        return success, work

    def launch(graph, stream):
        runtime.launched += 1
        STREAMS[stream].queue.extend(graph)
        return (success,)

    def free(graph):
        runtime.freed += 1
        return (success,)

    runtime.cudaStreamBeginCapture, runtime.cudaStreamEndCapture = begin, end
    runtime.cudaGraphInstantiate = lambda graph, flags: (success, graph)
    runtime.cudaGraphDestroy = lambda graph: (success,)
    runtime.cudaGraphLaunch, runtime.cudaGraphExecDestroy = launch, free
    runtime.cudaGetLastError = lambda: (success,)
    return runtime


def install(monkeypatch, driver, runtime=None):
    """Make `import pycuda.driver` and cuda-python's import give these."""
    package = ModuleType("pycuda")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, runtime if name.endswith("runtime") else None)
    if runtime is not None:
        for name in ("cuda", "cuda.bindings"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
