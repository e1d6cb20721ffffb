# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the driver's C API, as `runtime.gpu.driver` calls it, and for `pycuda.driver`, over host memory.

"Device" memory is host memory at real addresses. What is put on a stream is done only when somebody waits for it, so
that a missing wait, or a buffer that is used again too early, changes the output.
"""

import ctypes
import itertools
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import numpy as np

from internimage_deploy.runtime.gpu import driver as driver_module
from internimage_deploy.runtime.gpu.driver import SIGNATURES

STREAMS = {}
_handles = itertools.count(1000)

INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONTEXT, INVALID_HANDLE, CAPTURE_UNSUPPORTED = 1, 2, 201, 400, 900
_TEXTS = {2: "out of memory", 700: "an illegal memory access was encountered"}


class Stream:
    """Work that waits to be done, in order."""

    def __init__(self):
        self.queue, self.captured = [], None

    def put(self, work):
        (self.queue if self.captured is None else self.captured).append(work)

    def synchronize(self):
        assert self.captured is None, "operation not permitted when stream is capturing"
        while self.queue:
            self.queue.pop(0)()


class Event:
    """A place on a stream."""

    def __init__(self):
        self.stream, self.done, self.at = None, True, 0.0

    def mark(self):
        self.done, self.at = True, time.perf_counter()

    def wait(self):
        while not self.done:
            self.stream.queue.pop(0)()


class Gpu:
    """GPUs and the driver's library: its methods are the functions of `SIGNATURES`, each returns a CUresult.

    Attributes:
        used, pinned: bytes of device memory and of page-locked memory that are not freed.
        open: streams, events and graphs that are not destroyed, as (kind, handle).
        captured, launched, freed: counts of CUDA graphs.
        copies: kinds of copies that were enqueued: "HtoD", "DtoH", "DtoD".
        calls: names of all functions that were called.
        failing: {function: code}. A sticky code is then returned by every function.
        elsewhere: {address: GPU} of memory that is not on GPU 0.
        capturable: says of each capture, by its number, whether it succeeds.
    """

    def __init__(self, memory, capability, devices, capturable):
        self.memory, self.capability, self.devices, self.capturable = memory, capability, devices, capturable
        self.used = self.pinned = self.captured = self.launched = self.freed = self.captures = 0
        self.stack, self.open, self.copies, self.calls = [], set(), [], []
        self.failing, self.elsewhere, self.dead = {}, {}, 0
        self._memory, self._events, self._graphs, self._lock = {}, {}, {}, threading.RLock()
        STREAMS.clear()
        for handle in (1, 2):  # the two default streams
            STREAMS[handle] = Stream()

    def __getattr__(self, name):
        if name not in SIGNATURES:
            raise AttributeError(name)

        def call(*arguments):
            for kind, argument in zip(SIGNATURES[name], arguments, strict=True):
                kind.from_param(argument)  # raises where ctypes would not pass it to the driver
            with self._lock:  # work on a stream is done by whoever waits, one thread at a time
                return self._call(name, arguments)

        return call

    def _call(self, name, arguments):
        self.calls.append(name)
        if self.dead and name not in ("cuGetErrorString", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"):
            return self.dead
        if code := self.failing.get(name, 0):
            if code in driver_module.STICKY:
                self.dead = code
            return code
        return getattr(self, f"_{name.removesuffix('_v2')}")(*arguments) or 0

    # Devices and contexts

    def _cuInit(self, flags):
        pass

    def _cuGetErrorString(self, code, text):
        if code not in _TEXTS:
            return INVALID_VALUE
        text._obj.value = _TEXTS[code].encode()
        return None

    def _cuDeviceGetCount(self, count):
        count._obj.value = self.devices

    def _cuDeviceGet(self, device, index):
        device._obj.value = index

    def _cuDeviceGetName(self, name, size, device):
        name.value = b"Stand-in GPU"

    def _cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute]]

    def _cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 500 + device

    def _cuCtxGetCurrent(self, context):
        context._obj.value = self.stack[-1] if self.stack else None

    def _cuCtxGetDevice(self, device):
        if not self.stack:
            return INVALID_CONTEXT
        device._obj.value = self.stack[-1] - 500
        return None

    def _cuCtxPushCurrent(self, context):
        self.stack.append(context)

    def _cuCtxPopCurrent(self, context):
        context._obj.value = self.stack.pop()

    def _cuCtxSynchronize(self):
        for stream in list(STREAMS.values()):
            stream.synchronize()

    # Memory

    def _cuMemGetInfo(self, free, total):
        free._obj.value, total._obj.value = self.memory - self.used, self.memory

    def _cuMemAlloc(self, address, nbytes):
        if not self.stack:
            return INVALID_CONTEXT
        if self.used + nbytes > self.memory:
            return OUT_OF_MEMORY
        content = (ctypes.c_uint8 * (nbytes + 256))()
        place = -(-ctypes.addressof(content) // 256) * 256
        self._memory[place] = content, nbytes
        self.used += nbytes
        address._obj.value = place
        return None

    def _cuMemFree(self, address):
        self._cuCtxSynchronize()
        _, nbytes = self._memory.pop(address)
        self.used -= nbytes

    def _cuMemHostAlloc(self, address, nbytes, flags):
        content = (ctypes.c_uint8 * nbytes)()
        self._memory[ctypes.addressof(content)] = content, nbytes
        self.pinned += nbytes
        address._obj.value = ctypes.addressof(content)

    def _cuMemFreeHost(self, address):
        self.pinned -= self._memory.pop(address)[1]

    def _copy(self, kind, target, source, nbytes, stream):
        self.copies.append(kind)
        STREAMS[stream].put(lambda: ctypes.memmove(target, source, nbytes))

    def _cuMemcpyHtoDAsync(self, *arguments):
        self._copy("HtoD", *arguments)

    def _cuMemcpyDtoHAsync(self, *arguments):
        self._copy("DtoH", *arguments)

    def _cuMemcpyDtoDAsync(self, *arguments):
        self._copy("DtoD", *arguments)

    def _cuPointerGetAttribute(self, value, attribute, address):
        assert attribute == 9
        value._obj.value = self.elsewhere.get(address, 0)

    # Streams and events

    def _new(self, kind, handle, content, table):
        number = next(_handles)
        table[number] = content
        self.open.add((kind, number))
        handle._obj.value = number

    def _cuStreamCreate(self, stream, flags):
        assert flags == 1
        self._new("stream", stream, Stream(), STREAMS)

    def _cuStreamDestroy(self, stream):
        STREAMS[stream].synchronize()
        del STREAMS[stream]
        self.open.remove(("stream", stream))

    def _cuStreamSynchronize(self, stream):
        STREAMS[stream].synchronize()

    def _cuStreamQuery(self, stream):
        return 600 if STREAMS[stream].queue else 0

    def _cuStreamWaitEvent(self, stream, event, flags):
        # The event may be recorded again or destroyed before the wait comes to its turn.
        STREAMS[stream].put(self._events[event].wait)

    def _cuEventCreate(self, event, flags):
        assert flags in (0, 2)
        self._new("event", event, Event(), self._events)

    def _cuEventDestroy(self, event):
        del self._events[event]
        self.open.remove(("event", event))

    def _cuEventRecord(self, event, stream):
        place = self._events[event] = Event()
        place.stream, place.done = STREAMS[stream], False
        STREAMS[stream].put(place.mark)

    def _cuEventSynchronize(self, event):
        self._events[event].wait()

    def _cuEventElapsedTime(self, milliseconds, first, second):
        milliseconds._obj.value = (self._events[second].at - self._events[first].at) * 1e3

    # Graphs

    def _cuStreamBeginCapture(self, stream, mode):
        assert mode == 1
        self.captures += 1
        if not self.capturable(self.captures):
            return CAPTURE_UNSUPPORTED
        assert not STREAMS[stream].queue, "capturing begins on a stream at rest"
        STREAMS[stream].captured = []
        return None

    def _cuStreamEndCapture(self, stream, graph):
        work, STREAMS[stream].captured = STREAMS[stream].captured, None
        self.captured += 1
        self._new("graph", graph, work, self._graphs)

    def _cuGraphInstantiateWithFlags(self, executable, graph, flags):
        self._new("executable", executable, self._graphs[graph], self._graphs)

    def _cuGraphDestroy(self, graph):
        self.open.remove(("graph", graph))

    def _cuGraphLaunch(self, executable, stream):
        self.launched += 1
        STREAMS[stream].queue.extend(self._graphs[executable])

    def _cuGraphExecDestroy(self, executable):
        self.freed += 1
        self.open.remove(("executable", executable))


def make_driver(*, memory=1 << 30, capability=(8, 6), devices=1, capturable=lambda number: True):
    """GPUs of so much memory, and their driver's library."""
    return Gpu(memory, capability, devices, capturable)


def make_pycuda(gpu):
    """A `pycuda.driver` for `gpu`, with what `PyCudaLayer` uses of it."""
    pycuda = ModuleType("pycuda.driver")
    pycuda.Error = type("Error", (Exception,), {})
    pycuda.MemoryError = type("MemoryError", (pycuda.Error,), {})
    pycuda.allocations = 0

    def call(name, *arguments):
        if code := getattr(gpu, name)(*arguments):
            text = f"{name.removesuffix('_v2')} failed: {_TEXTS.get(code, 'error')}"
            raise (pycuda.MemoryError if code == OUT_OF_MEMORY else pycuda.Error)(text)

    def address_of(name, *arguments):
        address = ctypes.c_void_p()
        call(name, ctypes.byref(address), *arguments)
        pycuda.allocations += 1
        return address.value

    class Context:
        def __init__(self, handle):
            self.handle = handle

        def push(self):
            call("cuCtxPushCurrent_v2", self.handle)

        @staticmethod
        def pop():
            call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

        @staticmethod
        def get_current():
            return Context(gpu.stack[-1]) if gpu.stack else None

        @staticmethod
        def get_device():
            return Device(gpu.stack[-1] - 500)

    class Device:
        def __init__(self, number):
            self.number = number

        def __eq__(self, other):
            return self.number == other.number

        def retain_primary_context(self):
            return Context(500 + self.number)

    class Allocation:
        def __init__(self, name, free, *arguments):
            self.address, self.free_name = address_of(name, *arguments), free

        def __int__(self):
            return self.address

        def free(self):
            call(self.free_name, self.address)

    def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        allocation = Allocation("cuMemHostAlloc", "cuMemFreeHost", nbytes, 0)
        content = (ctypes.c_uint8 * nbytes).from_address(int(allocation))
        # As PyCUDA's: the array's base is the allocation.
        return SimpleNamespace(ctypes=SimpleNamespace(data=ctypes.addressof(content)), base=allocation)

    pycuda.init = lambda: None
    pycuda.Device, pycuda.Context = Device, Context
    pycuda.mem_alloc = lambda nbytes: Allocation("cuMemAlloc_v2", "cuMemFree_v2", nbytes)
    pycuda.pagelocked_empty = pagelocked_empty
    return pycuda


def install(monkeypatch, gpu, *, pycuda=True):
    """Let the device layer find this GPU, and PyCUDA if it shall be there; returns the stand-in for PyCUDA."""
    monkeypatch.setattr(driver_module, "library", lambda: gpu)
    module = make_pycuda(gpu) if pycuda else None
    package = ModuleType("pycuda") if pycuda else None
    if package:
        package.driver = module
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    return module
