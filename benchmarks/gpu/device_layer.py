# SPDX-License-Identifier: Apache-2.0
"""The runtime's device layer on a GPU without TensorRT: a stand-in for an engine's context launches a kernel.

The stand-in has the methods of `IExecutionContext` that the runtime calls. Its kernel computes 2 x + 1 and takes its
time, so that a missing wait, a stale graph or a buffer that is used again too early gives a wrong output.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from rows import OK, WRONG, Row
from task import Options, Task, Unavailable

from internimage_deploy.runtime.gpu import driver
from internimage_deploy.runtime.gpu.device import Device, DeviceBuffer
from internimage_deploy.runtime.gpu.device_array import DeviceArray
from internimage_deploy.runtime.gpu.execution_context import ExecutionContext

SHAPE, OTHER = (2, 3, 257), (1, 3, 64)
CYCLES = 200_000  # that the kernel waits, about a tenth of a millisecond

Launch = Callable[[int, int, int, int], None]
"""(address of x, address of y, number of elements, stream): enqueues y = 2 x + 1."""


def tasks(options: Options) -> Iterator[Task]:
    """Everything that a serving process does to the device layer."""
    for check in (
        recorded_and_replayed,
        shapes_in_turns,
        growing,
        two_in_flight,
        four_threads,
        timed_parts,
        closed_with_live_arrays,
        nothing_leaks,
        arrays_of_pytorch,
        outputs_to_pytorch,
        ordered_on_a_stream_of_pytorch,
        arrays_of_cupy,
    ):
        yield Task(check.__name__.replace("_", " "), check)


class StandInContext:
    """An execution context with one input "x" and one output "y" of the same shape."""

    def __init__(self) -> None:
        self.enqueued = 0
        self._launch = launcher()
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        """Every profile is there."""
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """The shape of both tensors."""
        self._shape = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        """Names of tensors without a shape: none."""
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape of both tensors."""
        return self._shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Where a tensor lies."""
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Enqueue the kernel."""
        self.enqueued += 1
        self._launch(self._addresses["x"], self._addresses["y"], math.prod(self._shape), stream)
        return True


@functools.cache
def launcher() -> Launch:
    """The stand-in's kernel, compiled for this GPU."""
    from kernel_library import HERE, compile_cuda

    library = ctypes.CDLL(str(compile_cuda("stand_in", [HERE / "stand_in.cu"], device().capability)))
    address, count = ctypes.c_void_p, ctypes.c_int64
    library.stand_in_launch.argtypes = [address, address, count, count, address]

    def launch(x: int, y: int, elements: int, stream: int) -> None:
        if code := library.stand_in_launch(x, y, elements, CYCLES, stream):
            raise RuntimeError(f"the stand-in's kernel failed with CUDA error {code}")

    return launch


@functools.cache
def device() -> Device:
    """The first GPU."""
    return Device()


@contextmanager
def contexts(count: int = 1, **options: Any) -> Iterator[list[ExecutionContext]]:
    """Execution contexts over stand-ins, with the device current in this thread; closed at the end."""
    with device().current(), ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(ExecutionContext(device(), StandInContext(), ("x", "y"), "float32", True, [], **options))
            stack.callback(made[-1].close)
        yield made


def batch(seed: int, shape: tuple[int, ...] = SHAPE) -> Any:
    """Random float32 numbers, others for each seed."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def verdict(wrong: list[Any], **more: object) -> Row:
    """The row of a check; `wrong` names what differed."""
    return {"status": WRONG if wrong else OK, **({"wrong": wrong[:20]} if wrong else {}), **more}


def _run(context: ExecutionContext, x: Any) -> bool:
    """Whether the output of `x` is right."""
    context.start(x, 0)
    return bool(np.array_equal(context.finish(), 2 * x + 1))


def recorded_and_replayed() -> Row:
    """One shape again and again: the graph is captured on the second run, and nothing is enqueued after that."""
    with contexts() as (context,):
        wrong = [seed for seed in range(20) if not _run(context, batch(seed))]
        enqueued = context.context.enqueued
    return verdict(wrong + ([f"enqueued {enqueued} times, expected 2"] if enqueued != 2 else []), enqueued=enqueued)


def shapes_in_turns() -> Row:
    """A, B, A, B, then A, A, B, B: a graph must never be replayed for another shape."""
    order = [SHAPE, OTHER] * 4 + [SHAPE, SHAPE, OTHER, OTHER] * 3
    with contexts() as (context,):
        return verdict([i for i, shape in enumerate(order) if not _run(context, batch(i, shape))])


def growing() -> Row:
    """Larger batches move the buffers."""
    with contexts() as (context,):
        sizes = [size for size in (1, 10, 100, 1000, 100_000, 1000) for _ in range(3)]
        return verdict([i for i, size in enumerate(sizes) if not _run(context, batch(i, (size, 3)))])


def two_in_flight() -> Row:
    """Two contexts, whose batches overlap."""
    wrong = []
    with contexts(2) as pair:
        for index in range(50):
            xs = [batch(2 * index), batch(2 * index + 1)]
            for context, x in zip(pair, xs, strict=True):
                context.start(x, 0)
            for context, x in zip(pair, xs, strict=True):
                if not np.array_equal(context.finish(), 2 * x + 1):
                    wrong.append(index)
    return verdict(wrong)


def four_threads() -> Row:
    """A context in each of four threads, which capture and replay at the same time."""
    wrong: list[Any] = []
    barrier = threading.Barrier(4)

    def work(thread: int) -> None:
        try:
            with contexts() as (context,):
                barrier.wait(60)
                for index in range(50):
                    shape = SHAPE if index % 10 < 7 else OTHER
                    if not _run(context, batch(1000 * thread + index, shape)):
                        wrong.append((thread, index))
        except Exception as error:  # in a thread nobody else would see it
            wrong.append(f"thread {thread}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdict(wrong)


def timed_parts() -> Row:
    """What `benchmark` prints: the parts of a run, all of them more than nothing."""
    with contexts() as (context,):
        parts = [context.measure(batch(seed), 0) for seed in range(5)][-1]
    return verdict([name for name, value in parts.items() if not value > 0], **parts)


def closed_with_live_arrays() -> Row:
    """An output that outlives its context must not take the device along."""
    with contexts() as (context,):
        x = batch(0)
        memory = upload(x)
        alive = context.run_on_device(DeviceArray(memory.address, x.shape, x.dtype, memory), 0)
        right = bool(np.array_equal(download(alive.address, alive.shape), 2 * x + 1))
        memory.free()
    with contexts() as (context,):
        again = _run(context, batch(1))
    del alive
    with contexts() as (context,):
        after = _run(context, batch(2))
    checks = {"the output": right, "the next context": again, "after the array was freed": after}
    return verdict([name for name, good in checks.items() if not good])


def nothing_leaks() -> Row:
    """Contexts that come and go leave the GPU's memory as it was."""
    large = (4, 1 << 20)  # 16 MB each way
    with contexts() as (context,):
        _run(context, batch(0))
    before = device().memory()[0]
    for seed in range(10):
        with contexts() as (context,):
            for _ in range(3):
                context.start(np.broadcast_to(np.float32(seed), large), 0)
                context.finish()
    lost = before - device().memory()[0]
    return verdict([f"{lost} bytes are missing"] if lost > 64e6 else [], lost_bytes=lost)


def upload(x: Any) -> DeviceBuffer:
    """A buffer on the GPU with the content of an array."""
    memory = DeviceBuffer(device())
    memory.reserve(x.nbytes)
    _copy("cuMemcpyHtoDAsync_v2", memory.address, x.ctypes.data, x.nbytes)
    return memory


def download(address: int, shape: tuple[int, ...]) -> Any:
    """Float32 numbers from the GPU."""
    found = np.empty(shape, np.float32)
    _copy("cuMemcpyDtoHAsync_v2", found.ctypes.data, address, found.nbytes)
    return found


def _copy(name: str, *arguments: int) -> None:
    device().call(name, *arguments, driver.LEGACY_STREAM)
    device().call("cuStreamSynchronize", driver.LEGACY_STREAM)


class ByInterface:
    """Another library's array through `__cuda_array_interface__` alone."""

    def __init__(self, array: Any) -> None:
        self.__cuda_array_interface__ = array.__cuda_array_interface__
        self.array = array


def _late(torch: Any, seed: int) -> tuple[Any, Any]:
    """(x in host memory, a tensor that becomes x late on the current stream)."""
    x = batch(seed)
    source = torch.from_numpy(x).cuda()
    torch.cuda.synchronize()
    tensor = torch.zeros_like(source)
    torch.cuda._sleep(20_000_000)
    tensor.copy_(source)
    return x, tensor


def arrays_of_pytorch() -> Row:
    """Tensors that are still being computed on a side stream, as DLPack and as `__cuda_array_interface__`."""
    import torch

    wrong = []
    side = torch.cuda.Stream()
    with contexts() as (context,):
        for seed in range(10):
            for view in (lambda tensor: tensor, ByInterface):
                with torch.cuda.stream(side):
                    x, tensor = _late(torch, seed)
                    if view is ByInterface:
                        side.synchronize()  # PyTorch's interface does not tell the stream
                    output = context.run_on_device(DeviceArray.of(view(tensor)), 0)
                if not np.array_equal(download(output.address, output.shape), 2 * x + 1):
                    wrong.append((seed, "DLPack" if view is not ByInterface else "__cuda_array_interface__"))
    return verdict(wrong)


def outputs_to_pytorch() -> Row:
    """Outputs that PyTorch reads through DLPack and `__cuda_array_interface__`."""
    import torch

    wrong = []
    with contexts() as (context,):
        for seed in range(10):
            x, tensor = _late(torch, seed)
            output = context.run_on_device(DeviceArray.of(tensor), 0)
            read = {"DLPack": torch.from_dlpack(output), "interface": torch.as_tensor(output, device="cuda")}
            wrong += [(seed, name) for name, y in read.items() if not np.array_equal(y.cpu().numpy(), 2 * x + 1)]
    return verdict(wrong)


def ordered_on_a_stream_of_pytorch() -> Row:
    """Input and output on the caller's stream, without the CPU waiting."""
    import torch

    wrong = []
    side = torch.cuda.Stream()
    with contexts() as (context,), torch.cuda.stream(side):
        for seed in range(20):
            x, tensor = _late(torch, seed)
            output = context.run_on_device(DeviceArray.of(tensor), 0, stream=side.cuda_stream)
            found = torch.from_dlpack(output) + 0
            if not np.array_equal(found.cpu().numpy(), 2 * x + 1):
                wrong.append(seed)
    return verdict(wrong)


def arrays_of_cupy() -> Row:
    """CuPy's arrays in and out, on a side stream."""
    try:
        import cupy
    except ImportError as error:
        raise Unavailable(f"CuPy is not installed here ({error})") from error

    wrong = []
    side = cupy.cuda.Stream(non_blocking=True)
    with contexts() as (context,):
        for seed in range(10):
            for view in (lambda array: array, ByInterface):
                x = batch(seed)
                with side:
                    array = cupy.asarray(x)
                    for _ in range(50):
                        array = array + 0
                    output = context.run_on_device(DeviceArray.of(view(array)), 0)
                    found = cupy.asnumpy(cupy.from_dlpack(output))
                if not np.array_equal(found, 2 * x + 1):
                    wrong.append((seed, "DLPack" if view is not ByInterface else "__cuda_array_interface__"))
    return verdict(wrong)
