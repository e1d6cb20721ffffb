# SPDX-License-Identifier: Apache-2.0
"""Engines against PyTorch and ONNX Runtime on this machine's GPU: correctness first, then time, memory and size.

    python benchmarks/gpu/engine.py -o out/engine.json                     InternImage-T + UperNet, 512x512
    python benchmarks/gpu/engine.py --model NAME --size 512x1024 --batch 1 8 --precision fp16
    python benchmarks/gpu/engine.py --dry-run                              what would run; needs no GPU

Every candidate gets the same random images. A candidate that cannot run here is named with the reason and gets no
figures; one whose labels agree with ONNX Runtime on the CPU on less than --agreement of the pixels is marked as wrong.
The report is written anew after every candidate, so a run that is stopped keeps what it measured. The exit code is 1
if a candidate was wrong.
Random weights leave many pixels nearly undecided, so agreement in float16 is a lower bound for trained ones.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import clone  # noqa: F401  # first: it finds the others
import numpy as np
import numpy.typing as npt

import report
from internimage_deploy import Segmenter, UserError
from internimage_deploy.card import Array
from internimage_deploy.errors import one_line
from internimage_deploy.runtime.backends.base import Backend
from internimage_deploy.runtime.backends.load import load_backend
from internimage_deploy.runtime.engine import compilers
from internimage_deploy.runtime.engine.build import build_engine
from internimage_deploy.runtime.engine.compilers import Compiler
from internimage_deploy.runtime.engine.engine_backend import ENGINE_BACKENDS, EngineBackend
from internimage_deploy.runtime.engine.prepare import Precision
from internimage_deploy.runtime.gpu.driver import gpu_problem
from internimage_deploy.timing import measure

WARM_UP, RUNS = 10, 50


@dataclass
class Result:
    """One candidate at one batch size; times are milliseconds per batch."""

    name: str
    batch: int
    reason: str = ""  # why there are no figures
    agreement: float = 0.0  # fraction of pixels with the labels of ONNX Runtime on the CPU
    logit_error: float = 0.0  # largest difference over the largest logit, where the candidate returns logits
    correct: bool = False
    median_ms: float = 0.0
    p95_ms: float = 0.0
    pictures_per_s: float = 0.0
    pre_ms: float = 0.0
    post_ms: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # medians of h2d_ms, infer_ms, d2h_ms, enqueue_ms
    memory_mb: float = 0.0  # of the GPU, taken by loading and running
    build_s: float = 0.0
    size_mb: float = 0.0


def main() -> int:
    """Measure, print a table, write JSON; returns the exit code."""
    arguments = _arguments()
    plan = list(_candidates(arguments.precision))
    if arguments.dry_run:
        print("\n".join(f"{name}, batch {batch}" for batch in arguments.batch for name, _ in plan))
        return 0
    problem = gpu_problem()
    if problem:
        sys.exit(f"error: this benchmark needs an NVIDIA GPU, and {problem}; --dry-run shows what would run")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in arguments.batch:
            model = _export(arguments, batch, Path(folder))
            images = np.random.default_rng(0).integers(0, 256, (batch, *arguments.size, 3), np.uint8)
            reference = _output(load_backend(model, "onnxruntime"), images)
            for name, run in plan:
                result = Result(name, batch)
                try:
                    run(result, model, images, reference, arguments)
                except Exception as error:  # whatever stops one, the others still run, and its row has the reason
                    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                    result.reason = kind + one_line(error)
                result.correct = not result.reason and result.agreement >= arguments.agreement
                results.append(result)
                print(_row(result), flush=True)
                if arguments.output:
                    rows = [asdict(result) for result in results]
                    report.write_to(arguments.output, compilers=_compilers(), rows=rows)
    return 1 if any(not result.reason and not result.correct for result in results) else 0


Candidate = Callable[[Result, Path, npt.NDArray[np.uint8], Array, argparse.Namespace], None]


def _candidates(precisions: list[Precision]) -> Iterator[tuple[str, Candidate]]:
    for backend in ENGINE_BACKENDS:
        for precision in precisions:
            for graphs in (True, False):
                name = f"{backend} {precision}{'' if graphs else ' without CUDA graphs'}"
                yield name, _engine(backend, precision, graphs)
    yield "onnxruntime-cuda fp32", _onnxruntime("onnxruntime-cuda")
    yield "onnxruntime-tensorrt fp32", _onnxruntime("onnxruntime-tensorrt")
    for precision in precisions:
        yield f"pytorch eager {precision}", _pytorch(precision, compiled=False)
        yield f"pytorch compile {precision}", _pytorch(precision, compiled=True)


def _engine(backend_name: EngineBackend, precision: Precision, graphs: bool) -> Candidate:
    def run(
        result: Result, model: Path, images: npt.NDArray[np.uint8], reference: Array, arguments: argparse.Namespace
    ) -> None:
        from internimage_deploy.runtime.gpu.device import Device

        compilers.choose(backend_name)
        device = Device()
        target = model.with_name(f"{backend_name}-{precision}-{result.batch}.engine")
        if not target.exists():
            built = build_engine(
                model,
                target,
                precision=precision,
                backend=backend_name,
                compute_capabilities=(device.capability,) if backend_name == "tensorrt-rtx" else (),
                use_timing_cache=False,
                fusion="rewritten",
            )
            result.build_s = built.seconds
        result.size_mb = target.stat().st_size / 1e6
        before = device.memory()[0]
        backend = load_backend(target, cuda_graphs=graphs)
        _compare(result, backend.run(images), reference)
        _time(result, lambda: backend.run(images))
        rows = [backend.measure(images) for _ in range(RUNS)]
        result.parts = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
        result.memory_mb = (before - device.memory()[0]) / 1e6
        _around(result, Segmenter(backend), images)
        backend.close()

    return run


def _onnxruntime(name: str) -> Candidate:
    def run(
        result: Result, model: Path, images: npt.NDArray[np.uint8], reference: Array, arguments: argparse.Namespace
    ) -> None:
        backend = load_backend(model, name)
        _compare(result, backend.run(images), reference)
        _time(result, lambda: backend.run(images))
        _around(result, Segmenter(backend), images)
        backend.close()

    return run


def _pytorch(precision: Precision, *, compiled: bool) -> Candidate:
    def run(
        result: Result, model: Path, images: npt.NDArray[np.uint8], reference: Array, arguments: argparse.Namespace
    ) -> None:
        import torch

        from internimage_deploy.card import IMAGENET_MEAN, IMAGENET_STD
        from internimage_deploy.exporter.models import build_random
        from internimage_deploy.exporter.presets import PRESETS

        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        torch.cuda.reset_peak_memory_stats()
        network: torch.nn.Module = build_random(PRESETS[arguments.model].config, 0).eval().cuda().to(dtype)
        if compiled:
            network.compile()
        mean, std = (torch.tensor(v, device="cuda").view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

        def forward() -> Array:
            with torch.inference_mode():
                batch = torch.from_numpy(images).cuda().permute(0, 3, 1, 2).float()
                return np.asarray(network(((batch - mean) / std).to(dtype)).float().cpu().numpy())

        _compare(result, forward(), reference)
        _time(result, forward)
        result.memory_mb = torch.cuda.max_memory_allocated() / 1e6

    return run


def _output(backend: Backend, images: npt.NDArray[np.uint8]) -> Array:
    output = backend.run(images)
    backend.close()
    return output


def _compare(result: Result, output: Array, reference: Array) -> None:
    """Labels and logits against the reference's logits (N, classes, H/4, W/4)."""
    result.agreement = float((output.argmax(1) == reference.argmax(1)).mean())
    result.logit_error = float(np.abs(output - reference).max() / np.abs(reference).max())


def _time(result: Result, call: Callable[[], object]) -> None:
    """From images in host memory to the output in host memory."""
    timing = measure({"call": call}, runs=RUNS, warmup=WARM_UP)["call"]
    result.median_ms, result.p95_ms = timing.median_ms, timing.p95_ms
    result.pictures_per_s = result.batch / result.median_ms * 1e3


def _around(result: Result, segmenter: Segmenter, images: npt.NDArray[np.uint8]) -> None:
    """Pre- and post-processing on the CPU."""
    start = time.perf_counter()
    prepared = [segmenter.prepare(image) for image in images]
    middle = time.perf_counter()
    outputs = segmenter.forward(prepared)
    end = time.perf_counter()
    for item, output in zip(prepared, outputs, strict=True):
        segmenter.finish(item, output)
    result.pre_ms, result.post_ms = (middle - start) * 1e3, (time.perf_counter() - end) * 1e3


def _export(arguments: argparse.Namespace, batch: int, folder: Path) -> Path:
    target = folder / f"model-{batch}.onnx"
    size = "x".join(map(str, arguments.size))
    command = [
        sys.executable,
        "-m",
        "internimage_deploy",
        "export-onnx",
        "--random",
        arguments.model,
        "-o",
        str(target),
    ]
    command += ["--size", size, "--batch", str(batch), "--emit", "logits", "--no-verify"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def _compilers() -> dict[str, str]:
    found = {backend: compilers.find(backend) for backend in ENGINE_BACKENDS}
    return {backend: one.version if isinstance(one, Compiler) else one.reason for backend, one in found.items()}


def _row(result: Result) -> str:
    head = f"{result.name:<40} batch {result.batch:<3}"
    if result.reason:
        return f"{head} not run: {result.reason}"
    parts = "  ".join(f"{name[:-3]} {value:.2f}" for name, value in result.parts.items())
    wrong = "" if result.correct else "  WRONG"
    return (
        f"{head} {result.median_ms:8.2f} ms  p95 {result.p95_ms:8.2f}  {result.pictures_per_s:8.1f}/s  {parts}  "
        f"pre {result.pre_ms:.1f}  post {result.post_ms:.1f}  {result.memory_mb:.0f} MB  "
        f"engine {result.size_mb:.0f} MB  build {result.build_s:.0f} s  labels {result.agreement:.3%}{wrong}"
    )


def _size(text: str) -> tuple[int, int]:
    height, width = (int(side) for side in text.split("x"))
    return height, width


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="upernet_internimage_t_512_160k_ade20k", help="a released model's name")
    parser.add_argument("--size", type=_size, default=(512, 512), metavar="HxW")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--precision", nargs="+", default=["fp32", "fp16"], choices=["fp32", "fp16", "bf16"])
    parser.add_argument("--agreement", type=float, default=0.99, help="minimum fraction of equal labels")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
