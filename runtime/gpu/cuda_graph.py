# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs over cuda-python: an engine's launches, captured once and replayed. TensorRT-RTX captures by itself."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


class CudaGraph:
    """Launches that were captured from a stream. Make one with `capture`."""

    def __init__(self, runtime: Any, executable: Any) -> None:
        self._cuda, self._executable = runtime, executable

    @staticmethod
    def capture(runtime: Any, stream: int, enqueue: Callable[[], None]) -> CudaGraph | None:
        """The graph of what `enqueue` puts on `stream`, or None where that cannot be captured.

        A failure leaves the stream usable, with nothing enqueued.

        Args:
            runtime: what `cuda_runtime` returned.
            stream: handle of a stream at rest.
            enqueue: enqueues work on `stream`; a `RuntimeError` of it counts as a failure.
        """
        success = runtime.cudaError_t.cudaSuccess
        # Relaxed would hide calls that may not be captured; thread-local leaves other threads alone.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        (code,) = runtime.cudaStreamBeginCapture(stream, mode)
        if code != success:
            return None
        failed = False
        try:
            enqueue()
        except RuntimeError:
            failed = True
        code, graph = runtime.cudaStreamEndCapture(stream)
        if failed or code != success:
            runtime.cudaGetLastError()  # the next call would report the error of a failed capture
            return None
        code, executable = runtime.cudaGraphInstantiate(graph, 0)
        runtime.cudaGraphDestroy(graph)
        return CudaGraph(runtime, executable) if code == success else None

    def launch(self, stream: int) -> None:
        """Enqueue the captured work on the stream with the handle `stream`. Raises `RuntimeError`."""
        (code,) = self._cuda.cudaGraphLaunch(self._executable, stream)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"cudaGraphLaunch failed: {code}")

    def free(self) -> None:
        """Free the graph's memory; it cannot be launched afterwards."""
        self._cuda.cudaGraphExecDestroy(self._executable)


def cuda_runtime() -> Any | None:
    """cuda-python's runtime module, or None where it is not installed, which is logged once."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # new and old name of the module
        try:
            return importlib.import_module(name)
        except (ImportError, RuntimeError):
            continue
    _log_missing_package()
    return None


@cache
def _log_missing_package() -> None:
    log.info("CUDA graphs are not used: the package cuda-python is not installed; run  pip install cuda-python")
