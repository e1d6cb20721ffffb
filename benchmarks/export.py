# SPDX-License-Identifier: Apache-2.0
"""Time and memory of an export.  Writes results/export.json.

    python benchmarks/export.py [NAME:SIZE ...]

Each export runs in a process of its own, with the verification against PyTorch, as a user would run it; time and peak
resident memory are those that the operating system reports for it. NAME is a released model, SIZE is HxW or "dynamic".
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import click

import report

DEFAULT = (
    "upernet_internimage_t_512_160k_ade20k:512x512",
    "upernet_internimage_t_512_160k_ade20k:dynamic",
    "upernet_internimage_h_896_160k_ade20k:512x512",
    "mask2former_internimage_h_896_80k_cocostuff2ade20k:896x896",
)


def measure(model: str, size: str) -> dict[str, object]:
    """Export once; seconds in all and per step, peak memory and files in GB, and the comparison it printed."""
    sizing = ["--dynamic"] if size == "dynamic" else ["--size", size]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx"
        command = [sys.executable, "-m", "internimage_deploy", "export-onnx", "--random", model, *sizing, "-o", target]
        start = perf_counter()
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        errors = process.stderr.read()  # a few lines: cannot fill the other pipe meanwhile
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - start
        if status:
            raise click.ClickException(f"exporting {model} failed:\n{errors}")
        gigabytes = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e9
    return {
        "model": model,
        "size": size,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "file_gb": round(gigabytes, 3),
        "steps_seconds": {
            name: float(value) for name, value in re.findall(r"^(\w+) +([\d.]+) s$", errors, re.MULTILINE)
        },
        "comparison": [line for line in output.splitlines() if "max error" in line],
    }


@click.command()
@click.argument("exports", nargs=-1, metavar="[NAME:SIZE]...")
def main(exports: tuple[str, ...]) -> None:
    """Measure exports of random weights and write the figures as JSON."""
    rows = []
    for export in exports or DEFAULT:
        model, _, size = export.partition(":")
        rows.append(measure(model, size or "dynamic"))
        click.echo(json.dumps(rows[-1]))
        report.write("export", rows)


if __name__ == "__main__":
    main()
