# SPDX-License-Identifier: Apache-2.0
"""`doctor`: what is installed, what is missing, and which command installs it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

import click

from internimage_deploy._version import __version__
from internimage_deploy.errors import one_line


@dataclass(frozen=True)
class Part:
    """A package.

    Attributes:
        title: name for people.
        module: import name.
        names: distributions that may provide the module.
        install: the command that installs it.
        purpose: what it is needed for.
        needed: every task needs it.
        try_import: it imports quickly enough to be tried.
        aliases: other import names of the same package.
    """

    title: str
    module: str
    names: tuple[str, ...]
    install: str
    purpose: str
    needed: bool = False
    try_import: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """The state of one package or tool."""

    title: str
    purpose: str
    state: Literal["installed", "missing", "broken"]
    detail: str  # version, or what is wrong
    install: str  # the command that would install it


def _extra(name: str) -> str:
    return f"pip install 'internimage-deploy[{name}]'"


_PARTS = (
    Part("numpy", "numpy", ("numpy",), "pip install numpy", "arrays", True, True),
    Part(
        "OpenCV",
        "cv2",
        ("opencv-python-headless", "opencv-python", "opencv-contrib-python"),
        "pip install opencv-python-headless",
        "resizing images",
        True,
        True,
    ),
    Part("Pillow", "PIL.Image", ("pillow",), "pip install pillow", "decoding images", True, True),
    Part("onnx", "onnx", ("onnx",), "pip install onnx", "reading models", True, True),
    Part(
        "ONNX Runtime",
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
        _extra("cpu"),
        "running models on the CPU",
        try_import=True,
    ),
    Part("OpenVINO", "openvino", ("openvino",), _extra("openvino"), "running models on Intel CPUs"),
    Part("PyTorch", "torch", ("torch",), _extra("export"), "export-onnx"),
    Part("onnxscript", "onnxscript", ("onnxscript",), _extra("export"), "export-onnx"),
    Part(
        "TensorRT",
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
        _extra("gpu"),
        "engines on NVIDIA GPUs (a Jetson has it from JetPack)",
    ),
    Part(
        "TensorRT-RTX",
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
        _extra("rtx"),
        "engines for desktop GPUs, built without one",
        aliases=("tensorrt_rtx_bindings",),
    ),
    Part("PyCUDA", "pycuda", ("pycuda",), "pip install pycuda", "running engines"),
    Part(
        "cuda-python",
        "cuda.bindings",
        ("cuda-python", "cuda-bindings"),
        "pip install cuda-python",
        "CUDA graphs of TensorRT engines",
        aliases=("cuda.cudart",),
    ),
    Part("FastAPI", "fastapi", ("fastapi",), _extra("serve"), "serve"),
    Part("uvicorn", "uvicorn", ("uvicorn",), _extra("serve"), "serve"),
    Part("python-multipart", "python_multipart", ("python-multipart",), _extra("serve"), "serve: forms"),
    Part("Ray", "ray", ("ray",), _extra("ray"), "many images on many machines"),
)

_TOOLS = (
    ("nvcc", "compiling the TensorRT plugin", "pip install nvidia-cuda-nvcc, or NVIDIA's CUDA toolkit"),
    ("cmake", "compiling the TensorRT plugin", "pip install cmake"),
    ("nvidia-smi", "an NVIDIA driver", "NVIDIA's driver for your GPU"),
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(as_json: bool) -> None:
    """Show what is installed, what is missing, and which command installs it.

    The exit code is 1 if a package that every task needs is missing or broken, or if no backend is installed.
    """
    findings = [examine(part) for part in _PARTS] + [_tool(*tool) for tool in _TOOLS]
    broken = {part.module for part, finding in zip(_PARTS, findings, strict=False) if finding.state == "broken"}
    backends = _backends(broken)
    needed = {part.title for part in _PARTS if part.needed}
    healthy = all(finding.state == "installed" for finding in findings if finding.title in needed) and bool(backends)
    system = {
        "internimage-deploy": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count() or 1,
        "gpus": _gpus(),
    }
    if as_json:
        report = {"system": system, "parts": [asdict(f) for f in findings], "backends": backends, "healthy": healthy}
        click.echo(json.dumps(report, indent=1))
    else:
        for name, value in system.items():
            click.echo(f"{name:20} {', '.join(value) or 'none seen' if isinstance(value, list) else value}")
        click.echo()
        for finding in findings:
            advice = "" if finding.state == "installed" else f"; install: {finding.install}"
            state = finding.detail if finding.state == "installed" else f"{finding.state} {finding.detail}".strip()
            click.echo(f"{finding.title:20} {state:14} {finding.purpose}{advice}")
        click.echo()
        click.echo(f"{'segment can use':20} {', '.join(backends) or 'nothing yet; run  ' + _extra('cpu')}")
    if not healthy:
        sys.exit(1)


def examine(part: Part) -> Finding:
    """Look for one package, whatever its import raises."""
    version = next(filter(None, map(_version, part.names)), None)
    if not _present(part.module) and not any(map(_present, part.aliases)):
        return Finding(part.title, part.purpose, "missing", "", part.install)
    if part.try_import:
        try:
            importlib.import_module(part.module)
        except Exception as error:  # a damaged package can raise anything
            detail = f"({type(error).__name__}: {one_line(error)})"
            return Finding(part.title, part.purpose, "broken", detail, part.install)
    return Finding(part.title, part.purpose, "installed", version or "unknown version", part.install)


def _present(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # looking for a.b imports a, and a damaged package can raise anything
        return False
    return spec is not None and spec.origin is not None  # a folder left over from an uninstall has no origin


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(name: str, purpose: str, install: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, purpose, "installed" if path else "missing", path or "", install)


def _gpus() -> list[str]:
    """Name, compute capability and driver version of the GPUs that nvidia-smi lists; none where it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in result.stdout.splitlines() if line.strip()]


def _backends(broken: set[str]) -> list[str]:
    """The backends whose package is installed and not in `broken`."""
    try:
        from internimage_deploy.runtime.backends.registry import REGISTRY, installed
    except Exception:  # numpy itself may be the broken part
        return []
    usable = []
    for name, entry in REGISTRY.items():
        with contextlib.suppress(Exception):  # asking onnxruntime for its providers imports it
            if entry.package not in broken and installed(entry):
                usable.append(name)
    return usable
