# SPDX-License-Identifier: Apache-2.0
"""An engine's execution context together with its stream, its buffers and its CUDA graph."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from internimage_deploy.card import Array
from internimage_deploy.runtime.gpu import driver
from internimage_deploy.runtime.gpu.cuda_graph import CudaGraph
from internimage_deploy.runtime.gpu.device import (
    Device,
    DeviceBuffer,
    DeviceError,
    Event,
    OutOfDeviceMemory,
    PinnedBuffer,
    Stream,
)
from internimage_deploy.runtime.gpu.device_array import READY, DeviceArray

if TYPE_CHECKING:
    import tensorrt as trt

_ALIGNMENT = 256  # of an address that TensorRT takes

# Element type of an output -> the type of the same size that NumPy has, for copying.
_STORAGE = {"bfloat16": "uint16"}


class ExecutionContext:
    """Runs batches one after another; with two of them the copies of one batch overlap the inference of another.

    All methods need the device's context to be current in the calling thread. `start` returns at once; `finish` waits.

    There is one CUDA graph, of the shape and the addresses that were bound when it was captured; when one of them
    changes, it is dropped. TensorRT keeps state for its current shape outside the graph, so a graph that is replayed
    after another shape may compute something wrong without an error; its documentation advises one execution context
    per graph. Whoever has several shapes uses several execution contexts (`ContextPool`).

    Attributes:
        shape: the input shape that is bound, () for none.
    """

    def __init__(
        self,
        device: Device,
        context: trt.IExecutionContext,
        names: tuple[str, str],
        output_dtype: str,
        graphs: bool,
        errors: list[str],
        *,
        has_profiles: bool = True,
        binds_arrays: bool | None = None,
    ) -> None:
        """Wrap TensorRT's `context`.

        Args:
            device: the GPU of the engine.
            context: an execution context of an engine with one input and one output.
            names: name of the input and name of the output.
            output_dtype: NumPy's name for the output's element type, or "bfloat16".
            graphs: capture CUDA graphs.
            errors: messages of TensorRT's logger, for errors; the latest comes last.
            has_profiles: the engine has optimisation profiles, so one must be chosen.
            binds_arrays: run GPU arrays where they lie. It costs a capture wherever the address changes, so the default
                is to do it without graphs, and with graphs to copy the array to where the graph reads it.
        """
        self.device, self.context = device, context
        self.input_name, self.output_name = names
        self.output_dtype = np.dtype(_STORAGE.get(output_dtype, output_dtype))
        self.errors = errors
        self.shape: tuple[int, ...] = ()
        self._graphs, self._has_profiles = graphs, has_profiles
        self._binds_arrays = not graphs if binds_arrays is None else binds_arrays
        self._graph: CudaGraph | None = None
        self._warm = False  # TensorRT has set up what is bound now, by a run without a graph
        self._unrecordable: set[tuple[int, ...]] = set()  # input shapes that could not be captured
        self._profile: int | None = None
        self._requested: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._output_shape: tuple[int, ...] = ()
        self._input, self._output = DeviceBuffer(device), DeviceBuffer(device)
        self._host_input, self._host_output = PinnedBuffer(device), PinnedBuffer(device)
        self.stream = Stream(device)
        self._done = Event(device)

    def start(self, batch: Array, profile: int) -> None:
        """Enqueue a batch: copy it to the GPU, run it with optimisation profile `profile`, copy the output back."""
        self._copy_in(batch, profile)
        self._run()
        self._copy_out()
        self._done.record(self.stream.handle)

    def finish(self) -> Array:
        """Wait for the batch that `start` started and return its output, a copy that belongs to the caller."""
        self._done.synchronize()
        return self._host_output.view(self._output_shape, self.output_dtype).copy()

    def measure(self, batch: Array, profile: int) -> dict[str, float]:
        """Run one batch with optimisation profile `profile` and time its parts.

        Returns:
            Milliseconds: `h2d_ms`, `infer_ms` and `d2h_ms` on the GPU, and `enqueue_ms`, the CPU's time to launch the
            inference.
        """
        with contextlib.ExitStack() as stack:
            marks = [Event(self.device, timed=True) for _ in range(4)]
            for mark in marks:
                stack.callback(mark.close)
            self._copy_in(batch, profile, marks[0])
            marks[1].record(self.stream.handle)
            start = time.perf_counter()
            self._run()
            enqueue_ms = (time.perf_counter() - start) * 1e3
            marks[2].record(self.stream.handle)
            self._copy_out()
            marks[3].record(self.stream.handle)
            marks[3].synchronize()
            parts = [first.milliseconds_until(second) for first, second in itertools.pairwise(marks)]
        return {**dict(zip(("h2d_ms", "infer_ms", "d2h_ms"), parts, strict=True)), "enqueue_ms": enqueue_ms}

    def run_on_device(
        self, batch: DeviceArray, profile: int, *, output: DeviceBuffer | None = None, stream: int | None = None
    ) -> DeviceArray:
        """Run a batch that is on the GPU; the output stays there, valid until this context runs again.

        Args:
            batch: the input.
            profile: number of the optimisation profile.
            output: where the output goes, and until when it is valid; None for this context's own memory.
            stream: handle of the caller's stream. The run is ordered there like a kernel that the caller launches, and
                the CPU does not wait. None waits until the output is ready and `batch` is no longer read.
        """
        nbytes = self._prepare(batch.shape, profile)
        output = output or self._output
        output.reserve(nbytes)
        for other in {batch.stream, stream}:
            if other is not None and other != READY:
                self.device.order(other, self.stream.handle)
        if batch.stream is None and stream is None:
            self.device.call("cuCtxSynchronize")
        if self._binds_arrays and batch.address % _ALIGNMENT == 0:
            self._bind(batch.address, output.address)
        else:
            self._input.reserve(batch.nbytes)
            self._bind(self._input.address, output.address)
            self.device.call(
                "cuMemcpyDtoDAsync_v2", self._input.address, batch.address, batch.nbytes, self.stream.handle
            )
        self._run()
        if stream is None:
            self.stream.synchronize()
        else:
            self.device.order(self.stream.handle, stream)
        ready_on = READY if stream is None else stream or driver.LEGACY_STREAM  # 0 in CUDA means the same stream
        return DeviceArray(output.address, self._output_shape, self.output_dtype, self, ready_on, self.device)

    def close(self) -> None:
        """Free everything, after the stream has come to rest. After an error of the GPU it frees what still can be."""
        for release in (
            self.stream.synchronize,
            self._drop_graph,
            self._done.close,
            self._input.free,
            self._output.free,
            self._host_input.free,
            self._host_output.free,
            self.stream.close,
        ):
            with contextlib.suppress(DeviceError, OutOfDeviceMemory):
                release()
        del self.context

    def _copy_in(self, batch: Array, profile: int, mark: Event | None = None) -> None:
        """Enqueue the copy of a batch to the GPU, behind `mark`."""
        nbytes = self._prepare(batch.shape, profile)
        self._input.reserve(batch.nbytes)
        self._output.reserve(nbytes)
        self._bind(self._input.address, self._output.address)
        staged = self._host_input.view(batch.shape, batch.dtype)
        np.copyto(staged, batch)
        if mark is not None:
            mark.record(self.stream.handle)
        self.device.call(
            "cuMemcpyHtoDAsync_v2", self._input.address, self._host_input.address, batch.nbytes, self.stream.handle
        )

    def _copy_out(self) -> None:
        nbytes = self._output_bytes
        self._host_output.reserve(nbytes)
        self.device.call(
            "cuMemcpyDtoHAsync_v2", self._host_output.address, self._output.address, nbytes, self.stream.handle
        )

    @property
    def _output_bytes(self) -> int:
        return math.prod(self._output_shape) * self.output_dtype.itemsize

    def _prepare(self, shape: tuple[int, ...], profile: int) -> int:
        """Set profile and shape for a batch, as far as they changed; returns the size of the output in bytes."""
        new_profile = self._has_profiles and profile != self._profile
        if new_profile or shape != self.shape:
            self.stream.synchronize()  # an earlier run may still use what is changed here
            self._drop_graph()
            self.shape = ()
            self._requested = shape
        if new_profile:
            self._check(
                "set_optimization_profile_async",
                lambda: self.context.set_optimization_profile_async(profile, self.stream.handle),
            )
            # The switch is done on the stream; shapes may be set only once it is.
            self.stream.synchronize()
            self._profile = profile
        if shape != self.shape:
            self._check("set_input_shape", lambda: self.context.set_input_shape(self.input_name, shape))
            self._check("infer_shapes", lambda: not self.context.infer_shapes())
            dims = self.context.get_tensor_shape(self.output_name)
            self._output_shape = tuple(dims[axis] for axis in range(len(dims)))
            self.shape = shape
        return self._output_bytes

    def _bind(self, input_address: int, output_address: int) -> None:
        """Give TensorRT the addresses, as far as they changed: each call makes plugins set up their shapes anew."""
        self._bind_one(self.input_name, input_address)
        self._bind_one(self.output_name, output_address)

    def _bind_one(self, name: str, address: int) -> None:
        if self._addresses.get(name) != address:
            self._drop_graph()
            self._addresses.pop(name, None)
            self._check("set_tensor_address", lambda: self.context.set_tensor_address(name, address))
            self._addresses[name] = address

    def _run(self) -> None:
        """Enqueue the inference, as a CUDA graph from the second run with the same shape and addresses on."""
        if self._graph is None and self._graphs and self._warm and self.shape not in self._unrecordable:
            # What TensorRT sets up on the first run is done, so nothing of it falls into the capture.
            self.stream.synchronize()
            self._graph = CudaGraph.capture(self.device, self.stream.handle, self._enqueue)
            if self._graph is None:
                self._unrecordable.add(self.shape)
        if self._graph is None:
            self._enqueue()
            self._warm = True
        else:
            self._graph.launch(self.stream.handle)

    def _enqueue(self) -> None:
        self._check("execute_async_v3", lambda: self.context.execute_async_v3(self.stream.handle))

    def _drop_graph(self) -> None:
        graph, self._graph, self._warm = self._graph, None, False
        if graph is not None:
            graph.free()

    def _check(self, name: str, call: Callable[[], bool]) -> None:
        """Make a call to TensorRT's context that returns False or raises a `RuntimeError` where it fails."""
        reason = ""
        try:
            if call():
                return
        except RuntimeError as error:
            reason = str(error)
        reason = self.errors[-1] if self.errors else reason
        message = f"{name} failed on {self.device.name} for an input of {self._requested}"
        raise DeviceError(f"{message}: {reason}" if reason else message, driver.sticky_code())
