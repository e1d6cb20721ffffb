# SPDX-License-Identifier: Apache-2.0
"""Engines on the stand-ins for TensorRT and CUDA."""

import dataclasses
import threading

from internimage_deploy.runtime.backends import registry
from internimage_deploy.runtime.backends import tensorrt as backend_module
from internimage_deploy.runtime.engine import build as build_module
from internimage_deploy.runtime.engine import sidecar
from internimage_deploy.runtime.engine.build import build_engine
from internimage_deploy.runtime.engine.compile import compile_engine
from internimage_deploy.runtime.engine.compilers import Compiler
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
}
"""What NVIDIA's type stubs hold and another version lacks."""


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
    fake_cuda.install(monkeypatch, gpu or fake_cuda.make_driver(), pycuda=pycuda)
    monkeypatch.setattr(build_module, "choose", lambda backend: Compiler("tensorrt", version))
    monkeypatch.setattr(
        build_module,
        "compile_in_process",
        lambda job, on_event: compile_engine(trt, job, on_event, threading.Event()),
    )
    monkeypatch.setattr(backend_module, "load_module", lambda backend: trt)
    monkeypatch.setattr(registry, "installed", lambda entry: True)
    built = build_engine(model, model.with_suffix(".engine"), use_timing_cache=False, **options)
    if card:
        old = sidecar.read(built.path)
        new = dataclasses.replace(old, engine=dataclasses.replace(old.engine, **card))
        sidecar.path_of(built.path).write_text(new.to_json())
    return built.path, trt
