# SPDX-License-Identifier: Apache-2.0
"""Engines on the stand-ins for TensorRT and CUDA."""

import dataclasses
import threading

import pytest

from internimage_deploy.runtime.backends import registry
from internimage_deploy.runtime.backends import tensorrt as backend_module
from internimage_deploy.runtime.engine import build as build_module
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.build import build, build_engine
from internimage_deploy.runtime.engine.compile import compile_engine
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.prepare import BuildOptions
from support import fake_cuda, fake_tensorrt

LACKS = {
    "8.5.3": (
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "IProgressMonitor",
        "BuilderFlag.STRIP_PLAN",
        "BuilderFlag.VERSION_COMPATIBLE",
        "PreviewFeature.PROFILE_SHARING_0806",
    ),
    "8.6.1": ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", "IProgressMonitor", "BuilderFlag.STRIP_PLAN"),
    "10.13.0": (),
    "11.1.0": (
        *("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "BuilderFlag.FP16", "BuilderFlag.BF16"),
        *("BuilderFlag.OBEY_PRECISION_CONSTRAINTS", "PreviewFeature.PROFILE_SHARING_0806"),
    ),
}
"""What NVIDIA's type stubs hold and another version lacks."""


def compile_with(monkeypatch, trt):
    """Compile with the stand-in `trt`, in this process."""
    monkeypatch.setattr(
        build_module,
        "compile_in_process",
        lambda job, on_event: compile_engine(trt, job, on_event, threading.Event()),
    )


def run_with(monkeypatch, trt, *, gpu=None, pycuda=True):
    """Let the backends find the stand-ins `trt` of TensorRT and `gpu` of CUDA."""
    fake_cuda.install(monkeypatch, gpu or fake_cuda.make_driver(), pycuda=pycuda)
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)


def stand_in_engine(monkeypatch, model, *, version="10.13.0", gpu=None, pycuda=True, card=None, **options):
    """Build an engine of `model`, and let the backends find the stand-ins of TensorRT and CUDA.

    Args:
        monkeypatch: pytest's.
        model: an ONNX file; the engine lies beside it.
        version: of TensorRT.
        gpu: of `fake_cuda.make_driver`.
        pycuda: PyCUDA is installed.
        card: fields of the engine's card to change.
        options: of `build_engine`.

    Returns:
        The engine's path and the module `tensorrt`.
    """
    trt = fake_tensorrt.make(version, without=LACKS[version])
    monkeypatch.setattr(build_module, "choose", lambda backend: Compiler("tensorrt", version))
    compile_with(monkeypatch, trt)
    run_with(monkeypatch, trt, gpu=gpu, pycuda=pycuda)
    built = build_engine(model, model.with_suffix(".engine"), use_timing_cache=False, **options)
    if card:
        old = sidecar.read(built.path)
        new = dataclasses.replace(old, engine=dataclasses.replace(old.engine, **card))
        sidecar.path_of(built.path).write_text(new.to_json())
    return built.path, trt


@pytest.fixture
def compile_here(monkeypatch, tmp_path):
    """Build with a stand-in of a version, in this process; returns (BuiltEngine, module, its only config)."""

    def compile_here(model, version="10.13.0", **options):
        trt = fake_tensorrt.make(version, without=LACKS[version])
        compile_with(monkeypatch, trt)
        library = tmp_path / "plugin.so"
        compiler = Compiler("tensorrt", version)
        monkeypatch.setattr("internimage_deploy.trt_plugins.library.check", lambda library, tensorrt: None)
        library.write_bytes(b"library")
        target = tmp_path / f"{version}.engine"
        options = BuildOptions(**options)
        built = build(model, target, compiler, options, on_event=events.append, find_plugin=lambda: library)
        return built, trt, trt.configs[0]

    compile_here.events = events = []
    return compile_here
