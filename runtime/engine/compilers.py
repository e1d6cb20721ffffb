# SPDX-License-Identifier: Apache-2.0
"""The two compilers: which are installed, what each can do here, and which one a build takes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.operators import Flavour

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")
# `tensorrt_rtx` is a small package over the bindings; the bindings alone do.
_MODULES: dict[Flavour, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
INSTALL: dict[Flavour, str] = {
    "tensorrt": "pip install 'internimage-deploy[gpu]'  (on a Jetson: TensorRT comes with JetPack)",
    "tensorrt-rtx": "pip install 'internimage-deploy[rtx]'",
}
_NAMES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


@dataclass(frozen=True)
class Compiler:
    """A compiler that can be used on this machine."""

    flavour: Flavour
    version: str
    module: str  # its import name


@dataclass(frozen=True)
class Absent:
    """Why a compiler cannot be used on this machine, and what would help."""

    flavour: Flavour
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{_NAMES[self.flavour]}: {self.reason}; {self.remedy}"


def load_module(flavour: Flavour) -> ModuleType:
    """The Python module of a compiler.

    Raises:
        ImportError: it is not installed, or its libraries do not load.
    """
    errors = []
    for name in _MODULES[flavour]:
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


def find(flavour: Flavour) -> Compiler | Absent:
    """The compiler of this flavour, or why there is none."""
    try:
        module = load_module(flavour)
    except ImportError as error:
        text = str(error)
        missing = "No module named" in text or "is empty" in text
        return Absent(flavour, "not installed" if missing else text, f"run  {INSTALL[flavour]}")
    if flavour == "tensorrt":
        gpu = gpu_problem()
        if gpu:
            return Absent(flavour, gpu, "it compiles on the GPU that will run the engine: build there")
    return Compiler(flavour, module.__version__, module.__name__)


def choose(flavour: Flavour | None = None) -> Compiler:
    """The compiler to build with: the one asked for, else TensorRT where it can work, else TensorRT-RTX.

    Raises:
        UserError: none can work here; the message says for each what is missing and how to install it.
    """
    absent = []
    for candidate in (flavour,) if flavour else FLAVOURS:
        found = find(candidate)
        if isinstance(found, Compiler):
            return found
        absent.append(str(found))
    head = "this compiler cannot work here" if flavour else "no compiler can work here"
    raise UserError(f"{head}: {'.  '.join(absent)}")


def gpu_problem() -> str:
    """Empty when the NVIDIA driver sees a GPU, else what is wrong. Asks the driver only; no CUDA toolkit is needed."""
    import ctypes
    import sys

    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return "no NVIDIA driver is installed here"
    if code := driver.cuInit(0):
        return f"the NVIDIA driver does not start (cuInit answered {code})"
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return "the NVIDIA driver sees no GPU"
    return ""
