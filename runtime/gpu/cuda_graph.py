# SPDX-License-Identifier: Apache-2.0
"""Recording an engine's launches once and replaying them, over cuda-python; TensorRT-RTX records by itself."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

log = logging.getLogger(__name__)


class Recorder:
    """Records what a function enqueues on a stream; a failure leaves the stream as it was."""

    def __init__(self, runtime: Any) -> None:
        self._cuda = runtime

    def record(self, stream: int, enqueue: Callable[[], None]) -> Any | None:
        """The recorded graph, ready to launch, or None where this cannot be recorded."""
        cuda = self._cuda
        # Relaxed would hide calls that may not be recorded; thread-local leaves other threads alone.
        (code,) = cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        if code != cuda.cudaError_t.cudaSuccess:
            return None
        failed = False
        try:
            enqueue()
        except RuntimeError:
            failed = True
        code, graph = cuda.cudaStreamEndCapture(stream)
        if failed or code != cuda.cudaError_t.cudaSuccess:
            cuda.cudaGetLastError()  # the error of a failed recording would be reported by the next call
            return None
        code, instance = cuda.cudaGraphInstantiate(graph, 0)
        cuda.cudaGraphDestroy(graph)
        return instance if code == cuda.cudaError_t.cudaSuccess else None

    def launch(self, graph: Any, stream: int) -> None:
        """Replay a recording. Raises `RuntimeError`."""
        (code,) = self._cuda.cudaGraphLaunch(graph, stream)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"cudaGraphLaunch failed: {code}")

    def free(self, graph: Any) -> None:
        """Give a recording's memory back."""
        self._cuda.cudaGraphExecDestroy(graph)


def recorder() -> Recorder | None:
    """A recorder, or None where cuda-python is not installed, which is logged once."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):  # new and old name of the module
        try:
            return Recorder(importlib.import_module(name))
        except (ImportError, RuntimeError):
            continue
    _say_what_is_missing()
    return None


@cache
def _say_what_is_missing() -> None:
    log.info("launches are not recorded (CUDA graphs): cuda-python is not there; run  pip install cuda-python")
