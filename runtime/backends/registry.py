# SPDX-License-Identifier: Apache-2.0
"""The table of backends: which of them are installed, which one reads a file, and how to load one by name."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.onnx_tools.model_file import CHECKPOINT_SUFFIXES
from internimage_deploy.runtime.backends.base import Backend
from internimage_deploy.runtime.engine.engine_backend import ENGINE_SUFFIXES


@dataclass(frozen=True)
class Entry:
    """How to load a backend, and how to know without importing it whether it can be loaded.

    Attributes:
        location: `module:function` of the function that loads a file; it is called as
            `function(path, threads=int | None)`, plus the options of `load_backend` that `options` names, and returns
            a `Backend`.
        suffixes: file name endings that the backend reads.
        package: import name that must be installed.
        extra: the extra of internimage-deploy that installs it.
        options: names of further options that `location` takes.
        provider: execution provider of ONNX Runtime that the package must have; empty for none.
    """

    location: str
    suffixes: tuple[str, ...]
    package: str
    extra: str
    options: tuple[str, ...] = ()
    provider: str = ""


_HERE = "internimage_deploy.runtime.backends"

_ONNX_OPTIONS = ("window",)
_ONNX_GPU_OPTIONS = ("window", "device")
_ENGINE_OPTIONS = ("trust_engine", "cuda_graphs", "device")

# `auto` takes the first that is installed and reads the file, or the fastest of `CPU_CANDIDATES`; an engine's card
# names its backend.
REGISTRY: dict[str, Entry] = {
    "onnxruntime": Entry(f"{_HERE}.onnxruntime:load", (".onnx",), "onnxruntime", "cpu", _ONNX_OPTIONS),
    "openvino": Entry(f"{_HERE}.openvino:load", (".onnx",), "openvino", "openvino", _ONNX_OPTIONS),
    "openvino-bf16": Entry(f"{_HERE}.openvino:load_bf16", (".onnx",), "openvino", "openvino", _ONNX_OPTIONS),
    "tensorrt": Entry(f"{_HERE}.tensorrt:load_tensorrt", ENGINE_SUFFIXES, "tensorrt", "gpu", _ENGINE_OPTIONS),
    "tensorrt-rtx": Entry(
        f"{_HERE}.tensorrt:load_rtx", ENGINE_SUFFIXES, "tensorrt_rtx_bindings", "rtx", _ENGINE_OPTIONS
    ),
    "onnxruntime-cuda": Entry(
        f"{_HERE}.ort_gpu:load_cuda",
        (".onnx",),
        "onnxruntime",
        "gpu",
        _ONNX_GPU_OPTIONS,
        provider="CUDAExecutionProvider",
    ),
    "onnxruntime-tensorrt": Entry(
        f"{_HERE}.ort_gpu:load_tensorrt",
        (".onnx",),
        "onnxruntime",
        "gpu",
        _ONNX_GPU_OPTIONS,
        provider="TensorrtExecutionProvider",
    ),
}

CPU_CANDIDATES = ("onnxruntime", "openvino")
"""Backends with equal results, of which `auto` takes the one that is faster on this machine."""


def installed(entry: Entry) -> bool:
    """True when the package behind `entry` can be imported."""
    try:
        spec = importlib.util.find_spec(entry.package)
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin is None:  # a folder left over from an uninstall has no origin
        return False
    return not entry.provider or entry.provider in importlib.import_module(entry.package).get_available_providers()


def reads(name: str, path: Path) -> bool:
    """True when the backend `name`, a key of `REGISTRY` or "auto", reads files of this kind."""
    return name == "auto" or path.suffix.lower() in REGISTRY[name].suffixes


def choose(path: Path, backend: str = "auto") -> str:
    """The name of the backend that will run `path`.

    Raises:
        UserError: no such backend, or it does not read this kind of file.
        MissingDependency: its package is not installed.
    """
    if backend != "auto" and backend not in REGISTRY:
        raise UserError(f"no backend '{backend}'; choose one of: auto, {', '.join(REGISTRY)}")
    names = list(REGISTRY) if backend == "auto" else [backend]
    fitting = [name for name in names if path.suffix.lower() in REGISTRY[name].suffixes]
    if path.suffix.lower() in CHECKPOINT_SUFFIXES:
        raise UserError(
            f"{path}: a checkpoint is not run directly; make it an ONNX file first with  "
            f"export-onnx --ckpt {path} -o {path.with_suffix('.onnx').name}"
        )
    if not fitting:
        known = sorted({suffix for name in names for suffix in REGISTRY[name].suffixes})
        who = "no backend reads" if backend == "auto" else f"the backend '{backend}' does not read"
        raise UserError(f"{path}: {who} this kind of file, expected a name ending in {' or '.join(known)}")
    if backend == "auto" and path.suffix.lower() in ENGINE_SUFFIXES:
        from internimage_deploy.runtime.engine import sidecar

        fitting = [sidecar.info_of(path).backend]
    for name in fitting:
        if installed(REGISTRY[name]):
            return name
    entry = REGISTRY[fitting[0]]
    if entry.provider and installed(replace(entry, provider="")):
        raise UserError(
            f"this {entry.package} has no {entry.provider}; install internimage-deploy[{entry.extra}] instead"
        )
    raise MissingDependency(entry.package, entry.extra, f"running {path.name}")


def open_backend(path: Path, name: str, *, threads: int | None = None, **options: object) -> Backend:
    """Load `path` into the backend `name`, a key of `REGISTRY`.

    Args:
        path: the model file.
        name: the backend.
        threads: CPU threads of the network; None for all.
        options: those that the backend has no use for are ignored; see `load_backend`.

    Raises:
        UserError: the backend cannot load the file.
    """
    entry = REGISTRY[name]
    module, _, function = entry.location.partition(":")
    fitting = {option: value for option, value in options.items() if option in entry.options}
    loaded: Backend = getattr(importlib.import_module(module), function)(path, threads=threads, **fitting)
    return loaded
