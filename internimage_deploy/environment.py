# SPDX-License-Identifier: Apache-2.0
"""The environment of a measurement, the same in every report: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "internimage-deploy",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
)


def environment(repository: Path | None = None) -> dict[str, object]:
    """Plain data for a JSON report.

    Args:
        repository: a folder of the clone whose commit is reported; None where the code is installed.
    """
    machine: dict[str, object] = {
        "cpu": _cpu(),
        "threads": available_cpus(),
        "system": platform.system(),
    }
    if hasattr(os, "getloadavg"):
        machine["load"] = round(os.getloadavg()[0], 1)
    if gpu := _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"):
        machine["gpu"] = gpu
    report: dict[str, object] = {
        "machine": machine,
        "versions": {"python": platform.python_version(), **{name: v for name in _PACKAGES if (v := _version(name))}},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if repository and (commit := _output("git", "rev-parse", "--short", "HEAD", folder=repository)):
        report["commit"] = commit
    return report


def available_cpus() -> int:
    """CPUs this process may use: a container's quota, where the operating system may count the whole machine."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        allowed = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(allowed, -(-int(quota) // int(period))), 1)
    except (OSError, ValueError):  # no control group, or one without a quota ("max")
        return allowed


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(named, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str, folder: Path | None = None) -> str:
    """The output of a command; empty if it is not installed or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
