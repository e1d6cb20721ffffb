# SPDX-License-Identifier: Apache-2.0
"""The one report: a benchmark's rows as JSON, with all that is needed to judge or repeat them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "onnxruntime", "openvino", "numpy", "onnx", "onnxscript")


def write(name: str, rows: Any, **facts: Any) -> Path:
    """Write `rows` to results/NAME.json; returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**environment(), **facts, "rows": rows}, indent=1) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Machine, versions, commit and command."""
    return {
        "machine": {"cpu": _cpu(), "threads": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)},
        "versions": {"python": platform.python_version(), **{p: v for p in _PACKAGES if (v := _version(p))}},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "command": " ".join(["python", *(os.path.relpath(sys.argv[0]), *sys.argv[1:])]),
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip()
