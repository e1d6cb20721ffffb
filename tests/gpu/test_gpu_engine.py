# SPDX-License-Identifier: Apache-2.0
"""Engines on a GPU, against a float64 reference and ONNX Runtime; the checks themselves run on stand-ins, too."""

import numpy as np
import pytest

from internimage_deploy.runtime.backends.fastest import sample
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.engine import build as build_module
from internimage_deploy.runtime.engine.build import build_engine
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.gpu.device import Device
from internimage_deploy.runtime.gpu.device_array import DeviceArray
from internimage_deploy.runtime.verification import compare, run_alone
from support import fake_cuda, fake_tensorrt
from support.dcnv3_cases import CASES, assert_close, expected
from support.device_memory import from_device, to_device
from support.engine_checks import assert_two_threads_agree_with_one, one_node_outputs
from support.engine_models import DYNAMIC_LOGITS, exported
from support.engine_stand_in import compile_with, run_with
from support.tiny_models import color_model

SIZE = (64, 96)
PROFILE = {"min": (1, 64, 64), "opt": (1, *SIZE), "max": (2, 96, 96)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_plugin_in_an_engine_of_one_node(case, dtype, trt, device, plugin, tmp_path):
    arrays, outputs = one_node_outputs(trt, device, case, dtype, plugin, tmp_path)
    for output in outputs:
        assert_close(output, expected(case, arrays), dtype)


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt-rtx"])
def engine(request, tmp_path_factory):
    """(ONNX file, backend with an engine of it in float32) of a small exported model."""
    name = request.param
    device = request.getfixturevalue("device")
    if name == "tensorrt":
        request.getfixturevalue("plugin")
    else:
        request.getfixturevalue("rtx")
    model = exported(*DYNAMIC_LOGITS)
    capabilities = (device.capability,) if name == "tensorrt-rtx" else ()
    path = tmp_path_factory.mktemp(name) / "model.engine"
    built = build_engine(model, path, backend=name, compute_capabilities=capabilities, **PROFILE)
    backend = load_backend(built.path, trust_engine=True)
    yield model, backend
    backend.close()


@pytest.mark.gpu
def test_an_engine_agrees_with_onnx_runtime(engine):
    model, backend = engine
    run_alone(backend, SIZE)  # shape, type, finite values, single images against a batch
    # Without TF32 sums differ in their order alone; random weights leave pixels with nearly equal logits.
    assert compare(backend, load_backend(model, "onnxruntime"), SIZE).agreement >= 0.99


@pytest.mark.gpu
def test_a_float16_engine_agrees_with_onnx_runtime(plugin, device, tmp_path):
    model = exported(*DYNAMIC_LOGITS)
    built = build_engine(model, tmp_path / "half.engine", precision="fp16", backend="tensorrt", **PROFILE)
    backend = load_backend(built.path, trust_engine=True)
    assert compare(backend, load_backend(model, "onnxruntime"), SIZE).agreement >= 0.95
    backend.close()


@pytest.mark.gpu
def test_two_threads_share_an_engine(engine):
    assert_two_threads_agree_with_one(engine[1], SIZE)


@pytest.mark.gpu
def test_an_array_on_the_gpu_stays_there(engine, device):
    _, backend = engine
    batch = sample(backend.card, SIZE)
    with device.current():
        memory = to_device(device, batch)
        output = backend.run_on_device(DeviceArray(memory.address, batch.shape, batch.dtype, memory))
        found = from_device(device, output.address, np.empty(output.shape, output.dtype))
        memory.free()
    np.testing.assert_array_equal(found, backend.run(batch))


@pytest.mark.gpu
def test_alternating_sizes_agree_with_onnx_runtime(engine):
    """Sizes in turn, each with its CUDA graph: a graph that belongs to another size would go unnoticed."""
    model, backend = engine
    reference = load_backend(model, "onnxruntime")
    batches = [sample(backend.card, size) for size in ((64, 64), (64, 96), (96, 96))]
    expected = [reference.run(one) for one in batches]
    first = [backend.run(one) for one in batches]
    for one, other in zip(first, expected, strict=True):
        assert np.mean(one.argmax(1) == other.argmax(1)) >= 0.98
    for _ in range(4):
        for one, before in zip(batches, first, strict=True):
            np.testing.assert_array_equal(backend.run(one), before)


# Without a GPU


@pytest.fixture
def stand_in(monkeypatch):
    """Stand-ins for TensorRT and CUDA; the module `tensorrt`."""
    trt = fake_tensorrt.make()
    fake_cuda.install(monkeypatch, fake_cuda.make_driver())
    monkeypatch.setattr("internimage_deploy.trt_plugins.library.check", lambda library, tensorrt: None)
    return trt


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_check_of_one_node_on_the_stand_in(case, stand_in, tmp_path):
    plugin = tmp_path / "plugin.so"
    plugin.touch()
    arrays, outputs = one_node_outputs(stand_in, Device(), case, "float32", plugin, tmp_path)
    for output in outputs:
        # ONNX's GridSample rounds coordinates in float32, which wide images feel.
        np.testing.assert_allclose(output, expected(case, arrays), atol=2e-3)


def test_the_check_of_two_threads_on_the_stand_in(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr(build_module, "choose", lambda backend: Compiler("tensorrt", stand_in.__version__))
    compile_with(monkeypatch, stand_in)
    run_with(monkeypatch, stand_in)
    model = color_model(tmp_path / "m.onnx")
    built = build_engine(model, tmp_path / "m.engine", use_timing_cache=False, **PROFILE)
    backend = load_backend(built.path)
    assert_two_threads_agree_with_one(backend, SIZE)
    assert compare(backend, load_backend(model, "onnxruntime"), SIZE).agreement == 1
