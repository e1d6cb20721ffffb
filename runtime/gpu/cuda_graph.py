# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: an engine's launches, captured once and replayed. TensorRT-RTX captures by itself."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable

from internimage_deploy.runtime.gpu import driver
from internimage_deploy.runtime.gpu.device import Device, DeviceError, OutOfDeviceMemory

log = logging.getLogger(__name__)


class CudaGraph:
    """Launches that were captured from a stream. Make one with `capture`."""

    def __init__(self, device: Device, executable: int) -> None:
        self._device, self._executable = device, executable

    @staticmethod
    def capture(device: Device, stream: int, enqueue: Callable[[], None]) -> CudaGraph | None:
        """The graph of what `enqueue` puts on `stream`, or None where that cannot be captured.

        A failure leaves the stream usable, with nothing enqueued. The device's context must be current.

        Args:
            device: the GPU of the stream.
            stream: handle of a stream at rest.
            enqueue: enqueues work on `stream`; a `RuntimeError` of it counts as a failure.

        Raises:
            DeviceError: the GPU cannot be used any more.
        """
        try:
            # Relaxed would hide calls that may not be captured; thread-local leaves other threads alone.
            device.call("cuStreamBeginCapture_v2", stream, driver.CAPTURE_THREAD_LOCAL)
            with contextlib.ExitStack() as graphs:
                try:
                    enqueue()
                finally:  # a stream that goes on capturing could never be used again
                    graph = ctypes.c_void_p()
                    device.call("cuStreamEndCapture", stream, ctypes.byref(graph))
                    graphs.callback(device.call, "cuGraphDestroy", graph.value)
                return CudaGraph(device, device.new_handle("cuGraphInstantiateWithFlags", graph.value, 0))
        except (RuntimeError, OutOfDeviceMemory) as error:
            if isinstance(error, DeviceError) and error.sticky:
                raise
            log.info("an input shape runs without a CUDA graph: %s", error)
            return None

    def launch(self, stream: int) -> None:
        """Enqueue the captured work on the stream with the handle `stream`. Raises `DeviceError`."""
        self._device.call("cuGraphLaunch", self._executable, stream)

    def free(self) -> None:
        """Free the graph's memory; it cannot be launched afterwards."""
        self._device.call("cuGraphExecDestroy", self._executable)
