# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on an NVIDIA GPU: the CUDA and the TensorRT execution provider."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from internimage_deploy.cache import cache_folder
from internimage_deploy.card import Array
from internimage_deploy.errors import UserError, one_line
from internimage_deploy.runtime.backends.base import Backend, check_output
from internimage_deploy.runtime.backends.onnx_file import read_onnx
from internimage_deploy.runtime.gpu.device import DeviceError, OutOfDeviceMemory
from internimage_deploy.runtime.gpu.driver import STICKY
from internimage_deploy.runtime.imaging.pipeline import WindowChoice

log = logging.getLogger(__name__)

_CUDA_FAILURE = re.compile(r"cuda failure (\d+)")  # in the text of ONNX Runtime's exceptions, in lower case
_CUDA, _TENSORRT, _CPU = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"


class OnnxRuntimeGpuBackend(Backend):
    """An ONNX Runtime session on a GPU; see `Backend`."""

    def __init__(
        self, path: Path, provider: str, *, threads: int | None = None, window: WindowChoice = None, device: int = 0
    ) -> None:
        import onnxruntime as ort

        self.name = "onnxruntime-tensorrt" if provider == _TENSORRT else "onnxruntime-cuda"
        model, self.card, changed = read_onnx(path, window)
        if provider not in ort.get_available_providers():
            raise UserError(
                f"this onnxruntime has no {provider} (it has {', '.join(ort.get_available_providers())}); run  "
                "pip uninstall onnxruntime && pip install 'internimage-deploy[gpu]'"
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        folder = str(path.absolute().parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        providers: list[str | tuple[str, dict[str, str]]] = [(_CUDA, _cuda_options(device)), _CPU]
        if provider == _TENSORRT:
            providers.insert(0, (_TENSORRT, _tensorrt_options(device)))
        try:
            source = model.SerializeToString() if changed else str(path)
            del model  # the session copies the weights
            self._session = ort.InferenceSession(source, options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise UserError(f"{path}: {self.name} cannot load this model ({one_line(error)})") from error
        # Where a GPU library is missing, ONNX Runtime falls back to the CPU and says so in its log only.
        if self._session.get_providers()[0] != provider:
            raise UserError(
                f"{self.name} fell back to {self._session.get_providers()[0]}: a CUDA, cuDNN or TensorRT library that "
                "this onnxruntime needs is missing or of another version; use --backend onnxruntime for the CPU"
            )

    def run(self, batch: Array) -> Array:
        try:
            (output,) = self._session.run([self.card.output.name], {self.card.input.name: batch})
        except Exception as error:
            text = str(error).lower()
            failure = _CUDA_FAILURE.search(text)
            if failure and int(failure[1]) in STICKY:
                raise DeviceError(f"{self.name}: {one_line(error)}", int(failure[1])) from error
            if "out of memory" in text or "alloc" in text:
                raise OutOfDeviceMemory(
                    f"not enough GPU memory for an input of {batch.shape}; use a smaller batch or --resize"
                ) from error
            raise
        return check_output(output, self.card, len(batch))

    def close(self) -> None:
        del self._session


def load_cuda(
    path: Path, *, threads: int | None = None, window: WindowChoice = None, device: int = 0
) -> OnnxRuntimeGpuBackend:
    """Load `path` with the CUDA execution provider. Raises `UserError`."""
    return OnnxRuntimeGpuBackend(path, _CUDA, threads=threads, window=window, device=device)


def load_tensorrt(
    path: Path, *, threads: int | None = None, window: WindowChoice = None, device: int = 0
) -> OnnxRuntimeGpuBackend:
    """Load `path` with the TensorRT execution provider, which builds engines as it goes. Raises `UserError`."""
    return OnnxRuntimeGpuBackend(path, _TENSORRT, threads=threads, window=window, device=device)


def _cuda_options(device: int) -> dict[str, str]:
    # Searching all convolution algorithms once per shape pays off from a few images on.
    return {"device_id": str(device), "cudnn_conv_algo_search": "EXHAUSTIVE"}


def _tensorrt_options(device: int) -> dict[str, str]:
    cache = cache_folder() / "onnxruntime-tensorrt"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("engines are built anew each time: cannot write %s (%s)", cache, error.strerror)
        return {"device_id": str(device)}
    return {
        "device_id": str(device),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "1",
    }
