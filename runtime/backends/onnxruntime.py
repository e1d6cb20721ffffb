# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU, the default backend of ONNX files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from internimage_deploy.card import Array, ModelCard
from internimage_deploy.environment import available_cpus
from internimage_deploy.errors import UserError, one_line
from internimage_deploy.onnx_tools.model_file import external_files
from internimage_deploy.runtime.backends import cpu_graph
from internimage_deploy.runtime.backends.base import Backend, check_output, input_size
from internimage_deploy.runtime.backends.onnx_file import read_onnx
from internimage_deploy.runtime.imaging.pipeline import WindowChoice

if TYPE_CHECKING:
    import onnx

log = logging.getLogger(__name__)

_FATAL = 4  # of ONNX Runtime's log levels
_INLINE_BYTES = 4096  # weights smaller than this are not worth a place in a file


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session; see `Backend`."""

    name = "onnxruntime"

    def __init__(self, path: Path, *, threads: int | None = None, window: WindowChoice = None) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        # Fatal errors only: it raises the others, and its warnings about folded nodes are nothing a user can act on.
        options.log_severity_level = _FATAL
        ort.set_default_logger_severity(_FATAL)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads or available_cpus()
        options.inter_op_num_threads = 1  # the graph is a chain: there are no nodes to run in parallel
        # Memory patterns take half as much memory again, beside the arena, and are no faster.
        options.enable_mem_pattern = False
        with _adapted(path, window) as (card, model, folder):
            self.card = card
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            try:
                self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                raise UserError(f"{path}: ONNX Runtime cannot load this model ({one_line(error)})") from error

    def run(self, batch: Array) -> Array:
        try:
            (output,) = self._session.run([self.card.output.name], {self.card.input.name: batch})
        except Exception as error:
            if "alloc" in str(error).lower() or isinstance(error, MemoryError):
                raise UserError(
                    f"not enough memory for an input of {batch.shape}; "
                    "use a smaller batch, a smaller --resize, or the sliding window"
                ) from error
            if isinstance(error, UserError) or not type(error).__module__.startswith("onnxruntime"):
                raise
            raise UserError(
                f"ONNX Runtime cannot run this model on an input of {batch.shape} ({one_line(error)}); "
                "export the model again"
            ) from error
        return check_output(output, self.card, len(batch), input_size(batch, self.card))

    def close(self) -> None:
        del self._session


def load(path: Path, *, threads: int | None = None, window: WindowChoice = None) -> OnnxRuntimeBackend:
    """Load `path`; see `load_backend`. Raises `UserError`."""
    return OnnxRuntimeBackend(path, threads=threads, window=window)


@contextmanager
def _adapted(path: Path, window: WindowChoice) -> Iterator[tuple[ModelCard, bytes | str, Path]]:
    """Card, model with the changes of `read_onnx` and `cpu_graph`, and the folder of the weights that it refers to.

    A session keeps for good the bytes that it was made from: with the weights in them, they would be in memory twice.
    So weights go to a temporary file that ONNX Runtime maps, unless they lie in a file of their own already.
    """
    model, card, returns_logits = read_onnx(path, window)
    changed, folder = bool(cpu_graph.adapt(model)) or returns_logits, path.absolute().parent
    with ExitStack() as stack:
        if changed and not external_files(model):
            try:
                folder = Path(stack.enter_context(_temporary_folder()))
                _move_weights(model, folder)
            except OSError as error:
                log.warning("%s runs slower than it could: no room for a temporary file (%s)", path, error)
                model, card, changed = read_onnx(path, window)  # of the other one, some weights may have moved
        source = model.SerializeToString() if changed else str(path)
        del model  # it would keep the moved weights in memory
        yield card, source, folder


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    # Windows does not remove a mapped file.
    return tempfile.TemporaryDirectory(prefix="internimage-deploy-", ignore_cleanup_errors=True)


def _move_weights(model: onnx.ModelProto, folder: Path) -> None:
    from onnx import external_data_helper

    external_data_helper.convert_model_to_external_data(model, size_threshold=_INLINE_BYTES)
    external_data_helper.write_external_data_tensors(model, str(folder))
