# SPDX-License-Identifier: Apache-2.0
"""OpenVINO on the CPU, in float32 or bfloat16."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from internimage_deploy.card import Array
from internimage_deploy.environment import available_cpus
from internimage_deploy.errors import UserError, one_line
from internimage_deploy.runtime.backends.base import Backend, check_output, input_size
from internimage_deploy.runtime.backends.onnx_file import read_onnx
from internimage_deploy.runtime.imaging.pipeline import WindowChoice

if TYPE_CHECKING:
    import onnx
    import openvino


class OpenVinoBackend(Backend):
    """A compiled OpenVINO model; see `Backend`.

    OpenVINO does not know model-local functions, so DCNv3's is inlined into the graph first. `precision` is what
    the network computes in: by default OpenVINO computes in bfloat16 where the CPU has it, which changes labels.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, window: WindowChoice = None, precision: str = "f32"
    ) -> None:
        import onnx
        import onnx.inliner
        import openvino

        self.name = "openvino" if precision == "f32" else f"openvino-{precision}"
        source, self.card, _ = read_onnx(path, window)
        core = openvino.Core()
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads or available_cpus(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            onnx.load_external_data_for_model(source, str(path.absolute().parent))
            inlined = onnx.inliner.inline_local_functions(source)
            del source
            if inlined.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF:
                onnx.checker.check_model(inlined)  # OpenVINO crashes on nodes without outputs and the like
                model = core.read_model(inlined.SerializeToString())
            else:
                model = _read_large_model(core, inlined)
            del inlined
            self._compiled = core.compile_model(model, "CPU", settings)
        except Exception as error:  # OpenVINO's exceptions are plain RuntimeErrors
            raise UserError(f"{path}: OpenVINO cannot load this model ({one_line(error)})") from error
        self._local = threading.local()  # one request per calling thread: a request holds one batch at a time

    def run(self, batch: Array) -> Array:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        try:
            output = request.infer([batch], share_inputs=True)[self._compiled.output(0)]
        except RuntimeError as error:  # OpenVINO's exceptions are plain RuntimeErrors
            raise UserError(
                f"OpenVINO cannot run this model on an input of {batch.shape} ({one_line(error)}); "
                "export the model again, or use a smaller image"
            ) from error
        return check_output(
            np.array(output, self.card.output.dtype), self.card, len(batch), input_size(batch, self.card)
        )

    def close(self) -> None:
        self._local = threading.local()
        del self._compiled


def load(path: Path, *, threads: int | None = None, window: WindowChoice = None) -> OpenVinoBackend:
    """Load `path` for float32; see `load_backend`. Raises `UserError`."""
    return OpenVinoBackend(path, threads=threads, window=window)


def load_bf16(path: Path, *, threads: int | None = None, window: WindowChoice = None) -> OpenVinoBackend:
    """Load `path` for bfloat16: faster on CPUs that have it, and a few labels in a thousand change."""
    return OpenVinoBackend(path, threads=threads, window=window, precision="bf16")


def _read_large_model(core: openvino.Core, model: onnx.ModelProto) -> openvino.Model:
    """Read a model larger than a protobuf message can be (2 GiB), through a temporary folder."""
    import tempfile

    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, str(path), save_as_external_data=True)
        return core.read_model(str(path)).clone()
