# SPDX-License-Identifier: Apache-2.0
"""One way through an engine: an execution context with its stream, its buffers and its recorded graphs."""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from internimage_deploy.runtime.gpu.device import Device, DeviceArray, DeviceBuffer, DeviceError, PinnedBuffer

if TYPE_CHECKING:
    import tensorrt as trt

    from internimage_deploy.runtime.gpu.cuda_graph import Recorder

_MOST_GRAPHS = 4  # recorded shapes per lane; a recording holds device memory

# What is copied: NumPy's name -> type of the same size that NumPy has.
_STORAGE = {"bfloat16": "uint16"}


class Lane:
    """Runs batches one after another; two lanes make copies and inference overlap.

    All methods need the device's context to be current. `start` returns at once; `finish` waits.
    """

    def __init__(
        self,
        device: Device,
        context: trt.IExecutionContext,
        names: tuple[str, str],
        output_dtype: str,
        recorder: Recorder | None,
        errors: list[str],
    ) -> None:
        self.device, self.context = device, context
        self.input_name, self.output_name = names
        self.output_dtype = np.dtype(_STORAGE.get(output_dtype, output_dtype))
        self.errors = errors
        self.stream = device.stream()
        self._done = device.event()
        self._recorder = recorder
        self._graphs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._source, self._answer = DeviceBuffer(device), DeviceBuffer(device)
        self._host_source, self._host_answer = PinnedBuffer(device), PinnedBuffer(device)
        self._shape: tuple[int, ...] = ()
        self._profile = 0
        self._answer_shape: tuple[int, ...] = ()
        self._warm: tuple[int, ...] = ()

    def start(self, batch: npt.NDArray[Any], profile: int) -> None:
        """Copy a batch in, run it, and copy the answer out, without waiting."""
        driver = self.device.driver
        self._prepare(batch.shape, profile, batch.nbytes)
        staged = self._host_source.view(batch.shape, batch.dtype)
        np.copyto(staged, batch)
        self.device.call("cuMemcpyHtoDAsync", driver.memcpy_htod_async, self._source.address, staged, self.stream)
        self._run()
        result = self._host_answer.view(self._answer_shape, self.output_dtype)
        self.device.call("cuMemcpyDtoHAsync", driver.memcpy_dtoh_async, result, self._answer.address, self.stream)
        self.device.call("cuEventRecord", self._done.record, self.stream)

    def finish(self) -> npt.NDArray[Any]:
        """Wait for the batch that `start` was given; returns its answer, which is the caller's to keep."""
        self.device.call("cuEventSynchronize", self._done.synchronize)
        return self._host_answer.view(self._answer_shape, self.output_dtype).copy()

    def measure(self, batch: npt.NDArray[Any], profile: int) -> dict[str, float]:
        """Run one batch and time its parts, in milliseconds.

        Returns:
            `h2d_ms`, `infer_ms`, `d2h_ms` on the GPU, and `enqueue_ms`, the CPU's time to launch the inference.
        """
        driver = self.device.driver
        self._prepare(batch.shape, profile, batch.nbytes)
        staged = self._host_source.view(batch.shape, batch.dtype)
        np.copyto(staged, batch)
        marks = [self.device.event(timed=True) for _ in range(4)]
        marks[0].record(self.stream)
        self.device.call("cuMemcpyHtoDAsync", driver.memcpy_htod_async, self._source.address, staged, self.stream)
        marks[1].record(self.stream)
        start = time.perf_counter()
        self._run()
        enqueue_ms = (time.perf_counter() - start) * 1e3
        marks[2].record(self.stream)
        result = self._host_answer.view(self._answer_shape, self.output_dtype)
        self.device.call("cuMemcpyDtoHAsync", driver.memcpy_dtoh_async, result, self._answer.address, self.stream)
        marks[3].record(self.stream)
        self.device.call("cuEventSynchronize", marks[3].synchronize)
        parts = (first.time_till(second) for first, second in itertools.pairwise(marks))
        return {**dict(zip(("h2d_ms", "infer_ms", "d2h_ms"), parts, strict=True)), "enqueue_ms": enqueue_ms}

    def run_on_device(self, batch: DeviceArray, profile: int) -> DeviceArray:
        """Run a batch that is on the GPU; the answer stays there and is valid until the lane runs again."""
        driver = self.device.driver
        self._prepare(batch.shape, profile, batch.nbytes)
        if batch.stream not in (0, 1, 2):  # ready on another stream: wait for it there, not on the CPU
            outer = driver.ExternalStream(batch.stream) if hasattr(driver, "ExternalStream") else None
            if outer is None:
                self.device.call("cuCtxSynchronize", driver.Context.synchronize)
            else:
                ready = self.device.event()
                self.device.call("cuEventRecord", ready.record, outer)
                self.device.call("cuStreamWaitEvent", self.stream.wait_for_event, ready)
        else:
            self.device.call("cuCtxSynchronize", driver.Context.synchronize)
        self.device.call(
            "cuMemcpyDtoDAsync",
            driver.memcpy_dtod_async,
            self._source.address,
            batch.address,
            batch.nbytes,
            self.stream,
        )
        self._run()
        self.device.call("cuStreamSynchronize", self.stream.synchronize)
        return DeviceArray(self._answer.address, self._answer_shape, self.output_dtype, self)

    def close(self) -> None:
        """Free buffers and graphs, after the stream has come to rest."""
        self.device.call("cuStreamSynchronize", self.stream.synchronize)
        self._forget_graphs()
        self._source.free()
        self._answer.free()

    def _prepare(self, shape: tuple[int, ...], profile: int, nbytes: int) -> None:
        """Profile, shape, buffers and addresses for a batch; nothing is done where nothing changed."""
        if profile != self._profile or not self._shape:
            self._check(
                "set_optimization_profile_async",
                self.context.set_optimization_profile_async(profile, self.stream.handle),
            )
            # The switch is done on the stream; shapes may be set only once it is.
            self.device.call("cuStreamSynchronize", self.stream.synchronize)
            self._profile = profile
            self._shape = ()
            self._forget_graphs()
        if shape != self._shape:
            self._check("set_input_shape", self.context.set_input_shape(self.input_name, shape))
            missing = self.context.infer_shapes()
            if missing:
                raise DeviceError(f"infer_shapes: the engine misses the shapes of {', '.join(missing)}")
            answer = self.context.get_tensor_shape(self.output_name)
            self._answer_shape = tuple(answer[axis] for axis in range(len(answer)))
            self._shape = shape
        answer_bytes = math.prod(self._answer_shape) * self.output_dtype.itemsize
        moved = self._source.reserve(nbytes) | self._answer.reserve(answer_bytes)
        if moved:
            self._forget_graphs()  # a graph holds the addresses that it was recorded with
        self._check("set_tensor_address", self.context.set_tensor_address(self.input_name, self._source.address))
        self._check("set_tensor_address", self.context.set_tensor_address(self.output_name, self._answer.address))

    def _run(self) -> None:
        graph = self._graphs.get(self._shape)
        if graph is not None:
            assert self._recorder is not None
            self._graphs.move_to_end(self._shape)
            self._recorder.launch(graph, self.stream.handle)
            return
        if self._recorder is not None and self._warm == self._shape:
            # The first run of a shape has happened, so nothing is left to be set up inside the recording.
            self.device.call("cuStreamSynchronize", self.stream.synchronize)
            graph = self._recorder.record(self.stream.handle, self._enqueue)
            if graph is not None:
                self._graphs[self._shape] = graph
                if len(self._graphs) > _MOST_GRAPHS:
                    self._recorder.free(self._graphs.popitem(last=False)[1])
                self._recorder.launch(graph, self.stream.handle)
                return
            self._recorder = None  # this engine cannot be recorded; it runs as before
        self._enqueue()
        self._warm = self._shape

    def _enqueue(self) -> None:
        self._check("execute_async_v3", self.context.execute_async_v3(self.stream.handle))

    def _forget_graphs(self) -> None:
        self._warm = ()
        while self._graphs:
            assert self._recorder is not None
            self._recorder.free(self._graphs.popitem()[1])

    def _check(self, call: str, good: bool) -> None:
        if not good:
            said = f": {self.errors[-1]}" if self.errors else ""
            raise DeviceError(f"{call} failed on {self.device.name} for an input of {self._shape}{said}")
