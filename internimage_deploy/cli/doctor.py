# SPDX-License-Identifier: Apache-2.0
"""`doctor`: what this machine can run and build, what is missing for that, and which command installs it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from internimage_deploy._version import __version__
from internimage_deploy.errors import one_line

if TYPE_CHECKING:
    from internimage_deploy.runtime.backends.availability import Availability


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
        gpu_only: it is of no use without an NVIDIA GPU.
    """

    title: str
    module: str
    names: tuple[str, ...]
    install: str
    purpose: str
    needed: bool = False
    try_import: bool = False
    aliases: tuple[str, ...] = ()
    gpu_only: bool = False


@dataclass(frozen=True)
class Finding:
    """The state of one package or tool."""

    title: str
    purpose: str
    state: Literal["installed", "missing", "broken", "not needed"]
    detail: str  # version, or what is wrong
    install: str  # the command that would install it


@dataclass(frozen=True)
class Gpu:
    """A GPU that nvidia-smi lists; `driver` is the version of its driver."""

    name: str
    compute_capability: str
    driver: str


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
        "building and running engines on an NVIDIA GPU (a Jetson has it from JetPack)",
        gpu_only=True,
    ),
    Part(
        "TensorRT-RTX",
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
        _extra("rtx"),
        "building engines for desktop GPUs, which needs no GPU; running them needs one",
        aliases=("tensorrt_rtx_bindings",),
    ),
    Part(
        "PyCUDA",
        "pycuda",
        ("pycuda",),
        _extra("pycuda"),
        "running engines in a program that uses PyCUDA; they run without it too",
        gpu_only=True,
    ),
    Part("FastAPI", "fastapi", ("fastapi",), _extra("serve"), "serve"),
    Part("uvicorn", "uvicorn", ("uvicorn",), _extra("serve"), "serve"),
    Part("python-multipart", "python_multipart", ("python-multipart",), _extra("serve"), "serve: forms"),
    Part("Ray", "ray", ("ray",), _extra("ray"), "many images on many machines"),
)

_TOOLS = (
    (
        "nvcc",
        "build-plugin, for TensorRT",
        f"{_extra('plugin-cu13')} for CUDA 13, or NVIDIA's CUDA toolkit, which CUDA 12 needs",
    ),
    ("cmake", "compiling that plugin with CMake instead, as on JetPack 5", "pip install cmake"),
)


_EXAMPLES = """\b
Examples:
  internimage-deploy doctor
  internimage-deploy doctor --json > report.json
"""


@click.command(epilog=_EXAMPLES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text, as for a bug report.")
def doctor(as_json: bool) -> None:
    """Show what this machine can run and build, what is missing, and which command installs it.

    The exit code is 1 if a package that every task needs is missing or broken, or if no backend can run a model.
    """
    gpus, gpu_problem = _gpus(), _gpu_problem()
    findings = [_without_gpu(part, examine(part), gpu_problem) for part in _PARTS]
    findings += [_tool(*tool) for tool in _TOOLS]
    table = _backends(gpu_problem, [gpu.compute_capability for gpu in gpus])
    backends = [row.backend for row in table if row.runs]
    needed = {part.title for part in _PARTS if part.needed}
    healthy = all(finding.state == "installed" for finding in findings if finding.title in needed) and bool(backends)
    system = {
        "internimage-deploy": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "platform": platform.platform(),
        "cpus": os.cpu_count() or 1,
        "gpus": [f"{gpu.name}, {gpu.compute_capability}, {gpu.driver}" for gpu in gpus],
        "driver's CUDA": _driver_cuda(),
    }
    if as_json:
        report = {
            "system": system,
            "gpu": {"problem": gpu_problem, "devices": [asdict(gpu) for gpu in gpus]},
            "parts": [asdict(f) for f in findings],
            "backends": backends,
            "backend_table": [{**asdict(row), "runs": row.runs, "builds": row.builds} for row in table],
            "healthy": healthy,
        }
        click.echo(json.dumps(report, indent=1))
    else:
        _print_report(system, gpu_problem, findings, table)
    if not healthy:
        sys.exit(1)


def _print_report(
    system: dict[str, object], gpu_problem: str, findings: Sequence[Finding], table: Sequence[Availability]
) -> None:
    for name, value in system.items():
        if name == "gpus":
            value = "; ".join(map(str, value)) if isinstance(value, list) else value
            value = (f"none usable: {gpu_problem}" if gpu_problem else value) or "one, which nvidia-smi does not list"
        click.echo(f"{name:20} {value}")
    click.echo()
    for finding in findings:
        advice = f"; install: {finding.install}" if finding.state in ("missing", "broken") else ""
        state = finding.detail if finding.state == "installed" else f"{finding.state} {finding.detail}".strip()
        click.echo(f"{finding.title:20} {state:14} {finding.purpose}{advice}")
    click.echo()
    words = {True: "yes", False: "no", None: "-"}
    click.echo(f"{'backend':20} {'run':4} {'build':6} why not")
    for row in table:
        reasons = {"run": row.run_problem, "build": row.build_problem or ""}
        text = ".  ".join(f"{task}: {reason}" for task, reason in reasons.items() if reason)
        click.echo(f"{row.backend:20} {words[row.runs]:4} {words[row.builds]:6} {text}".rstrip())
    click.echo()
    usable = ", ".join(row.backend for row in table if row.runs)
    click.echo(f"{'segment can use':20} {usable or 'nothing yet; run  ' + _extra('cpu')}")


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


def _without_gpu(part: Part, finding: Finding, gpu_problem: str) -> Finding:
    """The finding about a package that only a GPU would make useful, where there is none."""
    if not part.gpu_only or not gpu_problem or finding.state != "missing":
        return finding
    return replace(finding, state="not needed", detail="here, without a GPU:", install="")


def _gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none where it fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = ([field.strip() for field in line.split(",")] for line in result.stdout.splitlines())
    return [Gpu(*row) for row in rows if len(row) == 3]


def _driver_cuda() -> str:
    """Which CUDA the NVIDIA driver takes, for people; a compiled plugin must not be of a newer major version."""
    try:
        from internimage_deploy.trt_plugins.driver import cuda_version

        version = cuda_version()
    except Exception:  # a damaged driver
        version = None
    if version is None:
        return "no NVIDIA driver"
    return f"{version[0]}.{version[1]}; the plugin must be compiled with CUDA {version[0]} or older"


def _gpu_problem() -> str:
    """Why no GPU can be used here; empty where one can."""
    try:
        from internimage_deploy.runtime.gpu.driver import gpu_problem
    except Exception:  # numpy itself may be the broken part
        return "not looked for, because a package that every task needs is broken"
    problem = gpu_problem()
    if problem and _has_nvidia_hardware():
        return f"{problem}, and there is an NVIDIA GPU: install NVIDIA's driver, or give this process access to it"
    return problem


def _has_nvidia_hardware(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """True where Linux lists a display controller of NVIDIA, with or without a driver."""
    try:
        return any(
            (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03")
            for device in devices.iterdir()
        )
    except OSError:  # another system, or a container without it
        return False


def _backends(gpu_problem: str, compute_capabilities: Sequence[str]) -> list[Availability]:
    try:
        from internimage_deploy.runtime.backends.availability import availabilities
    except Exception:  # numpy itself may be the broken part
        return []
    return availabilities(gpu_problem, compute_capabilities)
