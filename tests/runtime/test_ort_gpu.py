# SPDX-License-Identifier: Apache-2.0
"""What ONNX Runtime's GPU providers are told, and what their failures become; without a GPU."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.gpu.device import DeviceError, OutOfDeviceMemory
from support.tiny_models import color_model


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """The CUDA provider's backend on GPU 1, with a session that raises `session.error`."""

    def run(names, inputs):
        raise session.error

    def make(source, options, providers):
        session.providers = providers
        return session

    session = SimpleNamespace(run=run, get_providers=lambda: ["CUDAExecutionProvider"])
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    return load_backend(color_model(tmp_path / "m.onnx"), "onnxruntime-cuda", device=1)


def test_the_provider_gets_the_number_of_the_gpu(backend):
    (name, options), cpu = backend._session.providers
    assert (name, options["device_id"], cpu) == ("CUDAExecutionProvider", "1", "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("text", "kind", "code"),
    [
        # As quoted in microsoft/onnxruntime issues 5295 and 26312.
        (
            "CUDA failure 700: an illegal memory access was encountered ; expr=cudaMalloc(&p, n);",
            DeviceError,
            700,
        ),
        (
            "CUDA failure 2: out of memory ; expr=cudaMalloc(&p, n);",
            OutOfDeviceMemory,
            0,
        ),
        ("Non-zero status code returned while running Conv node.", RuntimeError, 0),
    ],
)
def test_failures(text, kind, code, backend):
    backend._session.error = RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {text}")
    with pytest.raises(kind) as caught:
        backend.run(np.zeros((1, 64, 64, 3), np.uint8))
    assert type(caught.value) is kind
    assert getattr(caught.value, "code", 0) == code
