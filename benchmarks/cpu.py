# SPDX-License-Identifier: Apache-2.0
"""Whole networks on the CPU, interleaved: PyTorch, torch.compile, the plain export, ours.  Writes results/cpu.json.

    python benchmarks/cpu.py [--quick] [--models t,s] [--sizes 512x512,512x1024] [--threads 2]

Every network computes labels from the same uint8 image. Peak memory is of a process of its own that loads one file and
runs it three times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import report
from internimage_deploy.timing import measure
from report import Json

_PEAK = """
import sys
import numpy as np
kind, path, height, width, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
image = np.zeros((1, height, width, 3), np.uint8)
if kind == "plain":
    import onnxruntime as ort
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    run = lambda: session.run(None, {"image": image})
else:
    from pathlib import Path
    from internimage_deploy.runtime.backends.load import load_backend
    backend = load_backend(Path(path), kind, threads=threads)
    run = lambda: backend.run(image)
for _ in range(3):  # the arena has its full size from the second run on
    run()
status = open("/proc/self/status").read()  # ru_maxrss would start from the parent's
print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--add", action="store_true", help="keep the other models and sizes of the results")
    parser.add_argument("--quick", action="store_true", help="T at 512x512 only, three rounds")
    parser.add_argument("--models", default="t,s")
    parser.add_argument("--sizes", default="512x512,512x1024")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=40, help="maximum time per model and size, in seconds")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--name", default="cpu")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.sizes, arguments.runs, arguments.no_compile = "t", "512x512", 3, True
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes.split(",")]
    chosen = [(model, size) for model in arguments.models.split(",") for size in sizes]
    with tempfile.TemporaryDirectory() as folder:  # the first export of a process also pays for imports and caches
        exported(preset_of("t"), (64, 64), True, Path(folder))
    rows = report.kept(arguments.name, [(model, list(size)) for model, size in chosen]) if arguments.add else []
    for model, size in chosen:
        rows.append(row(model, size, arguments))
        show(rows[-1])
        report.write(arguments.name, rows, threads=arguments.threads)


def row(model: str, size: tuple[int, int], arguments: argparse.Namespace) -> dict[str, Json]:
    """All contestants for one model and size."""
    import torch

    from internimage_deploy.exporter.models import build_random
    from internimage_deploy.exporter.network import Network
    from internimage_deploy.exporter.options import ExportOptions
    from internimage_deploy.exporter.presets import PRESETS

    torch.set_num_threads(arguments.threads)
    name = preset_of(model)
    segmentor = build_random(PRESETS[name].config)
    weights_mb = sum(t.numel() * t.element_size() for t in segmentor.state_dict().values()) / 2**20
    options = ExportOptions(size=size, batch=1)
    network = Network(segmentor, options).eval()
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    tensor = torch.from_numpy(image)

    def eager() -> np.ndarray:
        with torch.inference_mode():
            return network(tensor).numpy()

    with tempfile.TemporaryDirectory() as folder:
        files, seconds = {}, {}
        for kind in ("plain", "ours"):
            files[kind], seconds[kind] = exported(name, size, kind == "plain", Path(folder))
        calls: dict[str, Callable[[], np.ndarray]] = {"PyTorch eager": eager}
        failed = {}
        if not arguments.no_compile:
            try:
                compiled = torch.compile(network)

                def fused() -> np.ndarray:
                    with torch.inference_mode():
                        return compiled(tensor).numpy()

                fused()
                calls["torch.compile"] = fused
            except Exception as error:  # what it cannot compile, or a missing C++ compiler
                failed["torch.compile"] = str(error).strip().splitlines()[0]
        calls["plain export, ONNX Runtime"] = plain_session(files["plain"], image, arguments.threads)
        calls["ours in plain ONNX Runtime"] = plain_session(files["ours"], image, arguments.threads)
        for backend in ("onnxruntime", "openvino", "openvino-bf16"):
            try:
                calls[f"ours, {backend}"] = backend_call(files["ours"], backend, image, arguments.threads)
            except Exception as error:  # not installed
                failed[backend] = str(error).strip().splitlines()[0]
        reference = eager()
        differ = {key: float((call() != reference).mean()) for key, call in calls.items()}
        # Random weights put many logits close together, where bfloat16 decides otherwise.
        wrong = [key for key, fraction in differ.items() if fraction > (0.1 if "bf16" in key else 1e-3)]
        if wrong:
            raise SystemExit(f"{wrong}: labels differ from PyTorch's: {differ}")
        times = measure(calls, runs=arguments.runs, warmup=1, seconds=arguments.seconds)
        del calls
        peaks = {
            kind: peak_mb(kind, files["plain" if kind == "plain" else "ours"], size, arguments.threads)
            for kind in ("plain", "onnxruntime")
        }
        return {
            "model": model,
            "size": list(size),
            "times": {key: {**timing.asdict(), "labels_differ": differ[key]} for key, timing in times.items()},
            "failed": failed,
            "weights_mb": round(weights_mb, 1),
            "file_mb": {kind: round(path.stat().st_size / 2**20, 1) for kind, path in files.items()},
            "export_s": seconds,
            "peak_mb": peaks,
        }


def preset_of(model: str) -> str:
    """The released model of a size, "t" to "g"."""
    from internimage_deploy.exporter.presets import PRESETS

    return next(key for key in PRESETS if key.startswith(f"upernet_internimage_{model}_") and key.endswith("ade20k"))


def exported(name: str, size: tuple[int, int], plain: bool, folder: Path) -> tuple[Path, float]:
    """Export with random weights; the file, and the seconds it took."""
    from internimage_deploy.exporter.export import export_model
    from internimage_deploy.exporter.options import ExportOptions
    from internimage_deploy.exporter.source import random_model

    path = folder / f"{'plain' if plain else 'ours'}.onnx"
    model = random_model(name)
    start = time.perf_counter()
    export_model(model, ExportOptions(size=size, batch=1, plain=plain), path, check=None)
    return path, round(time.perf_counter() - start, 1)


def plain_session(path: Path, image: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """The file as any ONNX Runtime user would run it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"image": image})[0]


def backend_call(path: Path, backend: str, image: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """The file as the runtime runs it."""
    from internimage_deploy.runtime.backends.load import load_backend

    loaded = load_backend(path, backend, threads=threads)
    return lambda: loaded.run(image)


def peak_mb(kind: str, path: Path, size: tuple[int, int], threads: int) -> float:
    """Peak memory, in MiB, of a process that loads `path` and runs it."""
    command = [sys.executable, "-c", _PEAK, kind, str(path), *map(str, size), str(threads)]
    return round(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout), 0)


def show(line: dict[str, Json]) -> None:
    """Print one row of the report."""
    height, width = line["size"]
    plain = line["times"]["plain export, ONNX Runtime"]
    print(f"== {line['model'].upper()} {height}x{width}")
    for key, timing in line["times"].items():
        ratio, cpu = timing["median_ms"] / plain["median_ms"], timing["cpu_ms"] / plain["cpu_ms"]
        print(
            f"  {key:28} median {timing['median_ms']:8.0f} ms  x {ratio:.2f}   processor {timing['cpu_ms']:7.0f} ms"
            f"  x {cpu:.2f}   CoV {100 * timing['cv']:.0f} %{'  UNSTABLE' if timing['unstable'] else ''}"
        )
    print("  " + json.dumps({key: line[key] for key in ("weights_mb", "file_mb", "export_s", "peak_mb", "failed")}))


if __name__ == "__main__":
    main()
