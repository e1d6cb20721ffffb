# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU: the embedded default."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy.typing as npt

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends import cpu_graph
from internimage_deploy.runtime.backends.base import check_answer
from internimage_deploy.runtime.card import ModelCard
from internimage_deploy.runtime.model_file import read_card


class OnnxRuntimeBackend:
    """An ONNX Runtime session; see `Backend`."""

    name = "onnxruntime"

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        import onnxruntime as ort

        self.card: ModelCard = read_card(path)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # warnings about folded nodes say nothing a user can act on
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads or available_cpus()
        options.inter_op_num_threads = 1  # the graph is a chain: nodes have nothing to run beside each other
        try:
            model = cpu_graph.changed(path) or str(path)
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise UserError(f"{path}: ONNX Runtime cannot load this model ({_first_line(error)})") from error
        inputs = [tensor.name for tensor in self._session.get_inputs()]
        outputs = [tensor.name for tensor in self._session.get_outputs()]
        if inputs != [self.card.input.name] or outputs != [self.card.output.name]:
            raise UserError(
                f"{path}: the graph maps {inputs} to {outputs}, its model card says "
                f"['{self.card.input.name}'] to ['{self.card.output.name}']; export the model again"
            )

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        try:
            (answer,) = self._session.run([self.card.output.name], {self.card.input.name: batch})
        except Exception as error:
            text = _first_line(error)
            if "alloc" in text.lower() or isinstance(error, MemoryError):
                raise UserError(
                    f"not enough memory for an input of {batch.shape}; "
                    "use a smaller batch, a smaller --resize, or the sliding window"
                ) from error
            raise
        return check_answer(answer, self.card, len(batch))

    def close(self) -> None:
        del self._session


def load(path: Path, *, threads: int | None = None) -> OnnxRuntimeBackend:
    """Load `path`; `threads` None uses every CPU this process may use. Raises `UserError`."""
    return OnnxRuntimeBackend(path, threads=threads)


def available_cpus() -> int:
    """CPUs this process may use: a container's share, where ONNX Runtime would count the whole machine."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        allowed = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(allowed, -(-int(quota) // int(period))), 1)
    except (OSError, ValueError):  # no control group, or one without a quota ("max")
        return allowed


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
