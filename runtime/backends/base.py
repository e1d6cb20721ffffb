# SPDX-License-Identifier: Apache-2.0
"""What a backend is, which ones there are, and how one is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from internimage_deploy.errors import MissingDependency, UserError
from internimage_deploy.runtime.card import ModelCard

log = logging.getLogger(__name__)


class Backend(Protocol):
    """A loaded network."""

    name: str
    card: ModelCard

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The network's answer to `batch`: input as `card.input` says, output as `card.output` says.

        Calls may come from several threads. Raises `UserError` where the machine is too small for the batch.
        """
        ...

    def close(self) -> None:
        """Free the network; it is not used afterwards."""
        ...


@dataclass(frozen=True)
class Entry:
    """How to find a backend without importing it.

    `location` is `module:function`; the function is called as `function(path, threads=int | None)`, with those of
    `options` that were given besides, and returns a `Backend`. `package` is the import name that must be there, `extra`
    the extra that installs it, `provider` the execution provider that the package must have been built with.
    """

    location: str
    suffixes: tuple[str, ...]
    package: str
    extra: str
    options: tuple[str, ...] = ()
    provider: str = ""


_HERE = "internimage_deploy.runtime.backends"

ENGINES = (".engine", ".plan", ".trt")
"""File name endings of engines."""

_ENGINE_OPTIONS = ("trust_engine", "cuda_graphs")

# `auto` takes the first that is installed and reads the file, or the fastest of `_RIVALS`; an engine names its own.
REGISTRY: dict[str, Entry] = {
    "onnxruntime": Entry(f"{_HERE}.onnxruntime:load", (".onnx",), "onnxruntime", "cpu"),
    "openvino": Entry(f"{_HERE}.openvino:load", (".onnx",), "openvino", "openvino"),
    "openvino-bf16": Entry(f"{_HERE}.openvino:load_bf16", (".onnx",), "openvino", "openvino"),
    "tensorrt": Entry(f"{_HERE}.tensorrt:load_tensorrt", ENGINES, "tensorrt", "gpu", _ENGINE_OPTIONS),
    "tensorrt-rtx": Entry(f"{_HERE}.tensorrt:load_rtx", ENGINES, "tensorrt_rtx_bindings", "rtx", _ENGINE_OPTIONS),
    "onnxruntime-cuda": Entry(
        f"{_HERE}.ort_gpu:load_cuda", (".onnx",), "onnxruntime", "gpu", provider="CUDAExecutionProvider"
    ),
    "onnxruntime-tensorrt": Entry(
        f"{_HERE}.ort_gpu:load_tensorrt", (".onnx",), "onnxruntime", "gpu", provider="TensorrtExecutionProvider"
    ),
}

_RIVALS = ("onnxruntime", "openvino")  # they answer alike, and which is faster depends on the machine and the model


def installed(entry: Entry) -> bool:
    """True when the package behind `entry` can be imported."""
    try:
        spec = importlib.util.find_spec(entry.package)
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin is None:  # a folder left over from an uninstall has no origin
        return False
    return not entry.provider or entry.provider in importlib.import_module(entry.package).get_available_providers()


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
    if not fitting:
        known = sorted({suffix for name in names for suffix in REGISTRY[name].suffixes})
        who = "no backend reads" if backend == "auto" else f"the backend '{backend}' does not read"
        raise UserError(f"{path}: {who} this kind of file, expected a name ending in {' or '.join(known)}")
    if backend == "auto" and path.suffix.lower() in ENGINES:
        from internimage_deploy.runtime.engine import sidecar

        fitting = [sidecar.info_of(path).flavour]
    for name in fitting:
        if installed(REGISTRY[name]):
            return name
    entry = REGISTRY[fitting[0]]
    if entry.provider and installed(replace(entry, provider="")):
        raise UserError(
            f"this {entry.package} has no {entry.provider}; install internimage-deploy[{entry.extra}] instead"
        )
    raise MissingDependency(entry.package, entry.extra, f"running {path.name}")


def load_backend(path: Path, backend: str = "auto", *, threads: int | None = None, **options: Any) -> Backend:
    """Load `path` into `backend`. Raises `UserError` if that cannot be done.

    Args:
        path: the model file.
        backend: a name of `REGISTRY`, or "auto": the fastest here where several CPU backends are installed.
        threads: CPU threads of the network; None for all.
        options: `trust_engine`, `cuda_graphs`: see `backends.tensorrt`; other backends have no use for them.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder, not a model file' if path.is_dir() else 'no such file'}")
    name = choose(path, backend)
    if backend == "auto" and name in _RIVALS:
        _say_that_the_gpu_is_idle()
        rivals = [rival for rival in _RIVALS if installed(REGISTRY[rival])]
        if len(rivals) > 1:
            from internimage_deploy.runtime.backends.fastest import load_fastest

            return load_fastest(path, rivals, threads=threads)
    entry = REGISTRY[name]
    module, _, function = entry.location.partition(":")
    fitting = {name: value for name, value in options.items() if name in entry.options}
    loaded: Backend = getattr(importlib.import_module(module), function)(path, threads=threads, **fitting)
    return loaded


def _say_that_the_gpu_is_idle() -> None:
    # onnxruntime-gpu has onnxruntime's import name, so nothing else tells that the GPU package is not what runs.
    if installed(REGISTRY["onnxruntime-cuda"]):
        from internimage_deploy.runtime.engine.compilers import gpu_problem

        if not gpu_problem():
            log.info("running on the CPU; --backend onnxruntime-cuda uses the GPU")


def answers(backend: Backend, batches: Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    """The answers to `batches`, in order; a backend that can start a batch beside another gets two at a time."""
    submit: Callable[[npt.NDArray[Any]], Callable[[], npt.NDArray[Any]]] | None = getattr(backend, "submit", None)
    if submit is None:
        yield from map(backend.run, batches)
        return
    waiting: Callable[[], npt.NDArray[Any]] | None = None
    for batch in batches:
        started = submit(batch)
        if waiting is not None:
            yield waiting()
        waiting = started
    if waiting is not None:
        yield waiting()


def check_answer(answer: npt.NDArray[Any], card: ModelCard, images: int) -> npt.NDArray[Any]:
    """`answer` itself if its rank and batch fit the card; raises `UserError` where file and card disagree."""
    rank = len(card.output.shape)
    if answer.ndim != rank or answer.shape[0] != images:
        raise UserError(
            f"the network answered {card.output.name} of shape {answer.shape} to {images} pictures, "
            f"expected {rank} dimensions as its model card says; export the model again"
        )
    return np.asarray(answer)


def first_line(error: BaseException) -> str:
    """What a runtime's many-lined exception says first, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
