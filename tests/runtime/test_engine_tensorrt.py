# SPDX-License-Identifier: Apache-2.0
"""Running engines against a stand-in made from NVIDIA's type stubs (fake_tensorrt) and one for CUDA (fake_cuda)."""

import dataclasses
import itertools
import re

import click
import numpy as np
import pytest
from click.testing import CliRunner

from internimage_deploy import Segmenter
from internimage_deploy.cli.main import LazyGroup, group
from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime import verification
from internimage_deploy.runtime.backends import registry
from internimage_deploy.runtime.backends import tensorrt as backend_module
from internimage_deploy.runtime.backends.base import Backend, run_each
from internimage_deploy.runtime.backends.fastest import sample
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.compilers import Compiler, find, load_module
from internimage_deploy.runtime.gpu import device
from internimage_deploy.runtime.gpu.device import Device, DeviceBuffer, DeviceError, OutOfDeviceMemory
from support import fake_cuda
from support.engine_models import DYNAMIC, exported, rtx
from support.engine_stand_in import run_with
from support.tiny_models import color_model, picture


def test_the_shared_api_is_in_tensorrt_rtx(compile_here, monkeypatch, tmp_path):
    """Every class member that building and running touches exists in the real TensorRT-RTX module."""
    rtx()
    real = load_module("tensorrt-rtx")
    segmenter, trt = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"))
    segmenter(picture(64, 96)[0])
    assert len(trt.used) > 15
    assert [f"{c}.{m}" for c, m in sorted(trt.used) if not hasattr(getattr(real, c), m)] == []
    # TensorRT-RTX's own part, by name.
    for owner, names in {
        "Runtime": ("get_engine_validity", "engine_header_size"),
        "ICudaEngine": ("create_runtime_config",),
        "IRuntimeConfig": ("cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"),
        "IRuntimeCache": ("serialize", "deserialize"),
        "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE", "DISABLED"),
        "EngineValidity": ("INVALID",),
    }.items():
        assert [name for name in names if not hasattr(getattr(real, owner), name)] == []


def engine_of(compile_here, monkeypatch, model, *, gpu=None, **options):
    """A `Segmenter` on a stand-in engine of `model`, and the module."""
    built, trt, _ = compile_here(model, **options)
    run_with(monkeypatch, trt, gpu=gpu)
    return Segmenter.load(built.path), trt


def sizes(*largest):
    return {"min": ((1, 32, 32),) * len(largest), "max": largest}


def test_labels_equal_those_of_onnxruntime(compile_here, monkeypatch, tmp_path):
    model = color_model(tmp_path / "m.onnx")
    segmenter, _ = engine_of(compile_here, monkeypatch, model, **sizes((2, 128, 128)))
    image, labels = picture(96, 120)
    np.testing.assert_array_equal(segmenter(image).labels, labels)
    np.testing.assert_array_equal(segmenter(image).labels, Segmenter.load(model, backend="onnxruntime")(image).labels)
    segmenter.close()


def test_batches_overlap_and_keep_their_order(compile_here, monkeypatch, tmp_path):
    segmenter, trt = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **sizes((2, 128, 128)))
    orders = [*itertools.permutations(range(3)), (0, 1, 2)]
    image, labels = picture(64, 96)
    parts = np.split(np.arange(96), 3)
    columns = [np.concatenate([parts[index] for index in order]) for order in orders]
    results = segmenter([np.ascontiguousarray(image[:, chosen]) for chosen in columns])
    for chosen, found in zip(columns, results, strict=True):
        np.testing.assert_array_equal(found.labels, labels[:, chosen])
    assert len(trt.contexts) == 2  # two execution contexts in one thread


def test_submit_returns_before_the_work_is_done(compile_here, monkeypatch, tmp_path):
    segmenter, _ = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **sizes((1, 64, 64)))
    backend = segmenter.backend
    batch = np.full((1, 64, 64, 3), 7, np.uint8)
    waits = [backend.submit(batch + step) for step in range(5)]  # the third waits for the first by itself
    means = [float(wait()[0, 0].mean()) for wait in reversed(waits)][::-1]
    assert np.allclose(np.diff(means), 1, atol=1e-3)


def test_profiles_are_switched(compile_here, monkeypatch, tmp_path):
    options = sizes((1, 64, 128), (1, 128, 64))
    segmenter, trt = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **options)
    for height, width in ((64, 128), (128, 64), (32, 32), (64, 128), (96, 32)):
        image, expected = picture(height, width)
        np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert ("IExecutionContext", "set_optimization_profile_async") in trt.used
    with pytest.raises(UserError, match=r"built for 1x32x32 to 1x64x128, 1x32x32 to 1x128x64 \(batch"):
        segmenter(picture(128, 128)[0])


def test_parts_are_timed_on_the_gpu(compile_here, monkeypatch, tmp_path):
    segmenter, _ = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **sizes((1, 64, 64)))
    times = segmenter.backend.measure(np.zeros((1, 64, 64, 3), np.uint8))
    assert set(times) == {"h2d_ms", "infer_ms", "d2h_ms", "enqueue_ms"}
    assert min(times.values()) > 0


def test_a_gpu_that_is_full(compile_here, monkeypatch, tmp_path):
    gpu = fake_cuda.make_driver(memory=50_000)
    segmenter, _ = engine_of(
        compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), gpu=gpu, **sizes((1, 512, 512))
    )
    with pytest.raises(OutOfDeviceMemory, match=r"cuMemAlloc of 0.8 MB: the GPU Stand-in GPU is out of memory; use a"):
        segmenter(picture(512, 512)[0])
    image, expected = picture(64, 64)  # the device is as usable as before
    np.testing.assert_array_equal(segmenter(image).labels, expected)
    assert gpu.stack == []


def test_a_call_that_fails_is_named(compile_here, monkeypatch, tmp_path):
    segmenter, trt = engine_of(compile_here, monkeypatch, color_model(tmp_path / "m.onnx"), **sizes((1, 64, 64)))
    good = trt.IExecutionContext._execute_async_v3
    trt.IExecutionContext._execute_async_v3 = lambda self, stream_handle: False
    with pytest.raises(DeviceError, match=r"execute_async_v3 failed on Stand-in GPU for an input of \(1, 64, 64, 3\)"):
        segmenter(picture(64, 64)[0])
    trt.IExecutionContext._execute_async_v3 = good
    image, expected = picture(64, 64)
    np.testing.assert_array_equal(segmenter(image).labels, expected)


def test_engines_that_do_not_fit(compile_here, monkeypatch, tmp_path):
    built, trt, _ = compile_here(color_model(tmp_path / "m.onnx"))
    fake_cuda.install(monkeypatch, fake_cuda.make_driver(capability=(7, 5)))
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)

    def with_info(**changes):
        card = sidecar.read(built.path)
        info = dataclasses.replace(card.engine, **changes)
        sidecar.path_of(built.path).write_text(dataclasses.replace(card, engine=info).to_json())

    with_info(compute_capabilities=("8.6",))
    with pytest.raises(UserError, match=r"built for compute capability 8.6, and this GPU \(Stand-in GPU\) has 7.5"):
        load_backend(built.path)
    with_info(compute_capabilities=(), version_compatible=True)
    with pytest.raises(UserError, match="--trust-engine"):
        load_backend(built.path)
    load_backend(built.path, trust_engine=True)
    with pytest.raises(UserError, match=r"an engine for TensorRT, and this is TensorRT-RTX 10.13.0"):
        load_backend(built.path, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("verify",), "64x64, batch 1: (1, 64, 64) uint8"),
        (("verify", "--size", "64x96", "--against"), "64x96: 100.0000% of the labels agree"),
        (("benchmark", "--runs", "3", "--no-cuda-graphs"), "tensorrt: median"),
    ],
    ids=["verify", "verify against the ONNX file", "benchmark"],
)
def test_commands_open_an_engine_with_an_embedded_plugin(arguments, printed, compile_here, monkeypatch):
    model = exported(*DYNAMIC)
    built, trt, _ = compile_here(model, embed_plugin=True)
    assert built.card.engine.plugin_embedded
    run_with(monkeypatch, trt)
    name, *options = arguments
    if "--against" in options:
        options += [model, "--against-backend", "onnxruntime"]
    command = LazyGroup().get_command(click.Context(group), name)
    words = [str(word) for word in (built.path, *options)]
    refused = CliRunner().invoke(command, words)
    assert isinstance(refused.exception, UserError)
    assert "load it with --trust-engine" in str(refused.exception)
    done = CliRunner().invoke(command, [*words, "--trust-engine"], catch_exceptions=False)
    assert printed in done.output


def test_without_tensorrt_or_a_gpu(compile_here, monkeypatch, tmp_path):
    built, trt, _ = compile_here(color_model(tmp_path / "m.onnx"))
    with pytest.raises(MissingDependency, match=r"running 10.13.0.engine needs the package 'tensorrt'.*\[gpu\]"):
        load_backend(built.path)
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    monkeypatch.setattr(device, "gpu_problem", lambda: "the NVIDIA driver sees no GPU")
    with pytest.raises(UserError, match=r"running an engine needs an NVIDIA GPU: the NVIDIA driver sees no GPU$"):
        load_backend(built.path)


def test_verify_runs_the_batches_that_an_engine_takes(compile_here, monkeypatch, tmp_path):
    model = color_model(tmp_path / "m.onnx")
    options = {"min": ((3, 64, 64),), "opt": ((4, 64, 96),), "max": ((8, 96, 96),)}
    segmenter, _ = engine_of(compile_here, monkeypatch, model, **options)
    engine = segmenter.backend
    assert verification.default_sizes(engine.card) == ((64, 64), (64, 96))
    run = verification.run_alone(engine, (64, 96))
    assert (run.batch, run.batch_difference) == (3, None)
    assert sample(engine.card).shape == (3, 64, 96, 3)
    assert verification.compare(engine, load_backend(model, "onnxruntime"), (64, 96)).agreement == 1


def test_stubs_alone_are_no_tensorrt():
    """The stubs are a folder that Python imports as an empty package."""
    absent = find("tensorrt")
    assert not isinstance(absent, Compiler)
    assert str(absent).startswith("TensorRT: not installed; run  pip install")


def test_buffers_are_reused(monkeypatch):
    gpu = fake_cuda.make_driver()
    fake_cuda.install(monkeypatch, gpu)
    device = Device()
    with device.current():
        buffer = DeviceBuffer(device)
        assert buffer.reserve(100)
        address = buffer.address
        assert not buffer.reserve(50)
        assert (buffer.address, gpu.used) == (address, 100)
        buffer.reserve(200)
        assert gpu.used == 200
        buffer.free()
        assert (gpu.used, buffer.address) == (0, 0)
    assert (device.name, device.capability) == ("Stand-in GPU", "8.6")


def test_no_gpu_of_that_number(monkeypatch):
    fake_cuda.install(monkeypatch, fake_cuda.make_driver(devices=1))
    with pytest.raises(UserError, match=re.escape("no GPU number 3: this machine has 1")):
        Device(3)


class Doubling(Backend):
    """Doubles numbers, `in_flight` at a time; a number in `broken` spoils everything in flight with it."""

    def __init__(self, in_flight, broken=()):
        self.in_flight, self.broken = in_flight, broken
        self.peak, self.started = 0, []

    def run(self, batch):
        if batch in self.broken:
            raise UserError(f"no {batch}")
        return batch * 2

    def submit(self, batch):
        self.started.append(batch)
        self.peak = max(self.peak, len(self.started))

        def wait():
            beside = list(self.started)
            self.started.remove(batch)
            if any(other in self.broken for other in beside):
                raise UserError("spoilt")
            return batch * 2

        return wait


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_outputs_come_in_order_and_with_what_they_belong_to(in_flight):
    backend = Doubling(in_flight)
    assert list(run_each(backend, ((f"tag {n}", n) for n in range(5)))) == [(f"tag {n}", 2 * n) for n in range(5)]
    assert backend.peak == in_flight


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_a_batch_that_fails_leaves_the_others_in_flight_alone(in_flight):
    found = dict(run_each(Doubling(in_flight, broken=(2,)), ((n, n) for n in range(6))))
    assert isinstance(error := found.pop(2), UserError)
    assert str(error) == "no 2"
    assert found == {0: 0, 1: 2, 3: 6, 4: 8, 5: 10}


def test_a_batch_that_cannot_be_started_leaves_the_others_alone():
    class Picky(Doubling):
        def submit(self, batch):
            if batch in self.broken:
                raise UserError("too large")
            return super().submit(batch)

    found = dict(run_each(Picky(2, broken=(1,)), ((n, n) for n in range(4))))
    assert str(found.pop(1)) == "no 1"
    assert found == {0: 0, 2: 4, 3: 6}
