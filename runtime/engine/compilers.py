# SPDX-License-Identifier: Apache-2.0
"""The compilers of engines: which of the two can work on this machine, and which one a build uses."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.engine_backend import DISPLAY_NAMES, ENGINE_BACKENDS, EXTRAS, EngineBackend
from internimage_deploy.runtime.gpu.driver import gpu_problem

# `tensorrt_rtx` is a small package over the bindings; the bindings alone are enough.
_MODULES: dict[EngineBackend, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}


@dataclass(frozen=True)
class Compiler:
    """A compiler that can be used on this machine."""

    backend: EngineBackend
    version: str

    def __str__(self) -> str:
        return f"{DISPLAY_NAMES[self.backend]} {self.version}"


@dataclass(frozen=True)
class Unavailable:
    """Why a compiler cannot be used on this machine, and what would help."""

    backend: EngineBackend
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{DISPLAY_NAMES[self.backend]}: {self.reason}; {self.remedy}"


def load_module(backend: EngineBackend) -> ModuleType:
    """The Python module of a backend.

    Raises:
        ImportError: it is not installed, or its libraries do not load.
    """
    errors = []
    for name in _MODULES[backend]:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            errors.append(error)
            continue
        # A folder with type stubs alone imports as an empty namespace package.
        if hasattr(module, "Builder"):
            return module
        errors.append(ImportError(f"the module '{name}' is empty (type stubs, or a broken installation)"))
    raise ImportError(str(errors[0]))


def find(backend: EngineBackend) -> Compiler | Unavailable:
    """The compiler of a backend, or why it cannot be used."""
    try:
        module = load_module(backend)
    except ImportError as error:
        text = str(error)
        missing = "No module named" in text or "is empty" in text
        jetpack = "  (on a Jetson: TensorRT comes with JetPack)" if backend == "tensorrt" else ""
        remedy = f"run  pip install 'internimage-deploy[{EXTRAS[backend]}]'{jetpack}"
        return Unavailable(backend, "not installed" if missing else text, remedy)
    if backend == "tensorrt" and (problem := gpu_problem()):
        return Unavailable(backend, problem, "it compiles on the GPU that will run the engine: build there")
    return Compiler(backend, module.__version__)


def choose(backend: EngineBackend | None = None) -> Compiler:
    """The compiler of `backend`; for None TensorRT where it can work, else TensorRT-RTX.

    Raises:
        UserError: none can work here; the message says for each what is missing and how to install it.
    """
    reasons = []
    for candidate in (backend,) if backend else ENGINE_BACKENDS:
        found = find(candidate)
        if isinstance(found, Compiler):
            return found
        reasons.append(str(found))
    head = "this compiler cannot work here" if backend else "no compiler can work here"
    raise UserError(f"{head}: {'.  '.join(reasons)}")
