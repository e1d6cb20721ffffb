# SPDX-License-Identifier: Apache-2.0
"""An engine's execution context together with its stream, its buffers and its CUDA graphs."""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from internimage_deploy.card import Array
from internimage_deploy.runtime.gpu.cuda_graph import CudaGraph
from internimage_deploy.runtime.gpu.device import Device, DeviceArray, DeviceBuffer, DeviceError, PinnedBuffer

if TYPE_CHECKING:
    import tensorrt as trt


_MAX_GRAPHS = 4  # captured shapes per execution context; a graph holds device memory

# Element type of an output -> the type of the same size that NumPy has, for copying.
_STORAGE = {"bfloat16": "uint16"}


class ExecutionContext:
    """Runs batches one after another; with two of them the copies of one batch overlap the inference of another.

    All methods need the device's context to be current in the calling thread. `start` returns at once; `finish` waits.
    """

    def __init__(
        self,
        device: Device,
        context: trt.IExecutionContext,
        names: tuple[str, str],
        output_dtype: str,
        cuda: Any | None,
        errors: list[str],
    ) -> None:
        """Wrap TensorRT's `context`.

        Args:
            device: the GPU of the engine.
            context: an execution context of an engine with one input and one output.
            names: name of the input and name of the output.
            output_dtype: NumPy's name for the output's element type, or "bfloat16".
            cuda: cuda-python's runtime, to capture CUDA graphs with; None for no graphs.
            errors: messages of TensorRT's logger, for errors; the latest comes last.
        """
        self.device, self.context = device, context
        self.input_name, self.output_name = names
        self.output_dtype = np.dtype(_STORAGE.get(output_dtype, output_dtype))
        self.errors = errors
        self.stream = device.stream()
        self._done = device.event()
        self._cuda = cuda
        self._graphs: OrderedDict[tuple[int, ...], CudaGraph] = OrderedDict()  # by input shape, least used first
        self._input, self._output = DeviceBuffer(device), DeviceBuffer(device)
        self._host_input, self._host_output = PinnedBuffer(device), PinnedBuffer(device)
        self._shape: tuple[int, ...] = ()
        self._profile = 0
        self._output_shape: tuple[int, ...] = ()
        self._warm_shape: tuple[int, ...] = ()  # input shape of the latest plain run

    def start(self, batch: Array, profile: int) -> None:
        """Enqueue a batch: copy it to the GPU, run it with optimisation profile `profile`, copy the output back."""
        driver = self.device.driver
        self._prepare(batch.shape, profile, batch.nbytes)
        staged = self._host_input.view(batch.shape, batch.dtype)
        np.copyto(staged, batch)
        self.device.call("cuMemcpyHtoDAsync", driver.memcpy_htod_async, self._input.address, staged, self.stream)
        self._run()
        result = self._host_output.view(self._output_shape, self.output_dtype)
        self.device.call("cuMemcpyDtoHAsync", driver.memcpy_dtoh_async, result, self._output.address, self.stream)
        self.device.call("cuEventRecord", self._done.record, self.stream)

    def finish(self) -> Array:
        """Wait for the batch that `start` started and return its output, a copy that belongs to the caller."""
        self.device.call("cuEventSynchronize", self._done.synchronize)
        return self._host_output.view(self._output_shape, self.output_dtype).copy()

    def measure(self, batch: Array, profile: int) -> dict[str, float]:
        """Run one batch with optimisation profile `profile` and time its parts.

        Returns:
            Milliseconds: `h2d_ms`, `infer_ms` and `d2h_ms` on the GPU, and `enqueue_ms`, the CPU's time to launch the
            inference.
        """
        driver = self.device.driver
        self._prepare(batch.shape, profile, batch.nbytes)
        staged = self._host_input.view(batch.shape, batch.dtype)
        np.copyto(staged, batch)
        marks = [self.device.event(timed=True) for _ in range(4)]
        marks[0].record(self.stream)
        self.device.call("cuMemcpyHtoDAsync", driver.memcpy_htod_async, self._input.address, staged, self.stream)
        marks[1].record(self.stream)
        start = time.perf_counter()
        self._run()
        enqueue_ms = (time.perf_counter() - start) * 1e3
        marks[2].record(self.stream)
        result = self._host_output.view(self._output_shape, self.output_dtype)
        self.device.call("cuMemcpyDtoHAsync", driver.memcpy_dtoh_async, result, self._output.address, self.stream)
        marks[3].record(self.stream)
        self.device.call("cuEventSynchronize", marks[3].synchronize)
        parts = (first.time_till(second) for first, second in itertools.pairwise(marks))
        return {**dict(zip(("h2d_ms", "infer_ms", "d2h_ms"), parts, strict=True)), "enqueue_ms": enqueue_ms}

    def run_on_device(self, batch: DeviceArray, profile: int) -> DeviceArray:
        """Run a batch that is on the GPU; the output stays there, valid until this context runs again."""
        driver = self.device.driver
        self._prepare(batch.shape, profile, batch.nbytes)
        if batch.stream not in (0, 1, 2):  # ready on another stream: wait for it there, not on the CPU
            producer = driver.ExternalStream(batch.stream) if hasattr(driver, "ExternalStream") else None
            if producer is None:
                self.device.call("cuCtxSynchronize", driver.Context.synchronize)
            else:
                ready = self.device.event()
                self.device.call("cuEventRecord", ready.record, producer)
                self.device.call("cuStreamWaitEvent", self.stream.wait_for_event, ready)
        else:
            self.device.call("cuCtxSynchronize", driver.Context.synchronize)
        self.device.call(
            "cuMemcpyDtoDAsync",
            driver.memcpy_dtod_async,
            self._input.address,
            batch.address,
            batch.nbytes,
            self.stream,
        )
        self._run()
        self.device.call("cuStreamSynchronize", self.stream.synchronize)
        return DeviceArray(self._output.address, self._output_shape, self.output_dtype, self)

    def close(self) -> None:
        """Free buffers and graphs, after the stream has come to rest."""
        self.device.call("cuStreamSynchronize", self.stream.synchronize)
        self._free_graphs()
        self._input.free()
        self._output.free()

    def _prepare(self, shape: tuple[int, ...], profile: int, nbytes: int) -> None:
        """Set profile, shape, buffers and addresses for a batch, as far as they changed."""
        if profile != self._profile or not self._shape:
            self._check(
                "set_optimization_profile_async",
                self.context.set_optimization_profile_async(profile, self.stream.handle),
            )
            # The switch is done on the stream; shapes may be set only once it is.
            self.device.call("cuStreamSynchronize", self.stream.synchronize)
            self._profile = profile
            self._shape = ()
            self._free_graphs()
        if shape != self._shape:
            self._check("set_input_shape", self.context.set_input_shape(self.input_name, shape))
            missing = self.context.infer_shapes()
            if missing:
                raise DeviceError(f"infer_shapes: the engine lacks the shapes of {', '.join(missing)}")
            dims = self.context.get_tensor_shape(self.output_name)
            self._output_shape = tuple(dims[axis] for axis in range(len(dims)))
            self._shape = shape
        output_bytes = math.prod(self._output_shape) * self.output_dtype.itemsize
        moved = self._input.reserve(nbytes) | self._output.reserve(output_bytes)
        if moved:
            self._free_graphs()  # a graph holds the addresses that it was captured with
        self._check("set_tensor_address", self.context.set_tensor_address(self.input_name, self._input.address))
        self._check("set_tensor_address", self.context.set_tensor_address(self.output_name, self._output.address))

    def _run(self) -> None:
        """Enqueue the inference, as a CUDA graph from the second run of a shape on."""
        graph = self._graphs.get(self._shape)
        if graph is None and self._cuda is not None and self._warm_shape == self._shape:
            graph = self._capture(self._cuda)
        if graph is None:
            self._enqueue()
            self._warm_shape = self._shape
            return
        self._graphs.move_to_end(self._shape)
        graph.launch(self.stream.handle)

    def _capture(self, cuda: Any) -> CudaGraph | None:
        # A plain run of this shape has happened, so nothing is left to be set up during the capture.
        self.device.call("cuStreamSynchronize", self.stream.synchronize)
        graph = CudaGraph.capture(cuda, self.stream.handle, self._enqueue)
        if graph is None:
            self._cuda = None  # this engine cannot be captured; it runs without graphs
            return None
        self._graphs[self._shape] = graph
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)[1].free()
        return graph

    def _enqueue(self) -> None:
        self._check("execute_async_v3", self.context.execute_async_v3(self.stream.handle))

    def _free_graphs(self) -> None:
        self._warm_shape = ()
        while self._graphs:
            self._graphs.popitem()[1].free()

    def _check(self, call: str, succeeded: bool) -> None:
        if not succeeded:
            reason = f": {self.errors[-1]}" if self.errors else ""
            raise DeviceError(f"{call} failed on {self.device.name} for an input of {self._shape}{reason}")
