# SPDX-License-Identifier: Apache-2.0
"""`make soak`: 200 clients for a minute, batched against unbatched, workers killed, 10,000 mutations, attacks.

The figures go to a JSON file with the conditions they were measured under. The exit code is 1 if a response was lost
or wrong, or had a status above 499 other than a 503 with Retry-After.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]

from soak_attacks import measure_attacks  # noqa: E402

from internimage_deploy.environment import environment  # noqa: E402
from internimage_deploy.runtime.pipelines.find import find_inputs  # noqa: E402
from internimage_deploy.runtime.segmenter import Segmenter  # noqa: E402
from support import fuzz, load  # noqa: E402
from support.load import Report, Sample  # noqa: E402
from support.served import Served, decoded, encoded  # noqa: E402

PACKAGES = ("fastapi", "opencv-python-headless", "pillow", "uvicorn")
ROUNDS = 3
BACKEND = "onnxruntime"
OPTIONS = ("--backend", BACKEND, "--threads", "1")

T = TypeVar("T")
Results = dict[str, Any]
"""What a stage measured, as it goes into the JSON file."""
Rates = dict[int, list[float]]
"""Images per second in each round, by batch size."""


def samples(model: Path, folder: Path) -> list[Sample]:
    """The images of `folder`, as PNG, with what direct calls return for them."""
    made = []
    with Segmenter.load(model, backend=BACKEND, threads=1) as segmenter:
        for file in find_inputs([str(folder)]).images:
            result = segmenter(str(file))
            made.append(Sample(encoded(result.image), result.mask(), result.labels))
    return made


async def watch_memory(server: Served, work: Coroutine[Any, Any, T], interval_s: float = 1.0) -> tuple[T, list[int]]:
    """The result of `work`, and the bytes of memory of the service every second meanwhile."""
    task, memory = asyncio.ensure_future(work), []
    while not task.done():
        memory.append(await asyncio.to_thread(server.resident_bytes))
        await asyncio.wait({task}, timeout=interval_s)
    return task.result(), memory


def measure_load(model: Path, inputs: list[Sample], clients: int, seconds: float, folder: Path) -> Results:
    """Many clients against a bounded queue: a 503 comes at once, everything else is right."""
    with Served(model, folder, *OPTIONS) as server:
        asyncio.run(load.run(server.port, inputs, clients=8, each=4))
        with multiprocessing.get_context("spawn").Pool(1) as single_client:
            single_client.apply(time.sleep, (0,))  # started before it counts
            probe = single_client.apply_async(load.probe, (server.port, inputs[0].data, seconds))
            before, own_before = server.cpu_seconds(), time.process_time()
            work = load.run(server.port, inputs, clients=clients, seconds=seconds)
            report, memory = asyncio.run(watch_memory(server, work))
            front, workers = (
                round(after - start, 1) for after, start in zip(server.cpu_seconds(), before, strict=True)
            )
            own = round(time.process_time() - own_before, 1)
            probed = [took for status, took in probe.get() if status == 503]
        quarter = max(len(memory) // 4, 1)
        images, batches = server.metric("internimage_batch_size_sum"), server.metric("internimage_batch_size_count")
        return {
            "clients": clients,
            "seconds": round(report.seconds, 1),
            **report.summary(),
            "refused_ms, seen by a single client in a process of its own": load.percentiles(probed),
            "cpu_s": {"front": front, "worker": workers, "clients": own},
            "problems": report.wrong[:5],
            "mean batch": round(images / batches, 2),
            "memory_mb": {
                "second quarter": round(statistics.median(memory[quarter : 2 * quarter]) / 2**20),
                "last quarter": round(statistics.median(memory[-quarter:]) / 2**20),
                "highest": round(max(memory) / 2**20),
            },
        }


def measure_batching(model: Path, inputs: list[Sample], seconds: float, folder: Path) -> Results:
    """Images per second with and without batches, in turns; 32 clients, no 503. And those of the network alone."""
    reports: dict[int, list[Report]] = {1: [], 8: []}
    with contextlib.ExitStack() as stack:
        servers = {}
        for batch in reports:
            (folder / str(batch)).mkdir()
            options = (*OPTIONS, "--batch", batch, "--queue", "1000")
            servers[batch] = stack.enter_context(Served(model, folder / str(batch), *options))
            asyncio.run(load.run(servers[batch].port, inputs, clients=8, each=4))
        for _ in range(ROUNDS):
            for batch, server in servers.items():
                reports[batch].append(asyncio.run(load.run(server.port, inputs, clients=32, seconds=seconds)))
    rates = {batch: [len(turn.answered) / turn.seconds for turn in turns] for batch, turns in reports.items()}
    wrong = [problem for turns in reports.values() for turn in turns for problem in turn.wrong]
    return {
        "answered per second": summarize(rates),
        "the network alone, pictures per second": summarize(network_rates(model, inputs)),
        "lost or wrong": len(wrong),
        "problems": wrong[:5],
    }


def network_rates(model: Path, inputs: list[Sample]) -> Rates:
    """Images per second of the network on one thread, by batch size, with neither HTTP nor files."""
    segmenters = {batch: Segmenter.load(model, backend=BACKEND, threads=1, batch=batch) for batch in (1, 8)}
    images = [segmenters[1].prepare(decoded(sample.data)) for sample in inputs[:24]]
    rates: Rates = {batch: [] for batch in segmenters}
    for turn in range(2 * ROUNDS + 1):
        for batch, segmenter in segmenters.items():
            began = time.perf_counter()
            for start in range(0, len(images), batch):
                segmenter.forward(images[start : start + batch])
            if turn:  # the first warms up
                rates[batch].append(len(images) / (time.perf_counter() - began))
    return rates


def summarize(rates: Rates) -> Results:
    """Medians by batch size, all turns, and the median of the turns' ratios: the machine may change its speed."""
    return {
        **{f"batch {batch}": round(statistics.median(turns), 1) for batch, turns in rates.items()},
        "turns": {f"batch {batch}": [round(rate, 1) for rate in turns] for batch, turns in rates.items()},
        "ratio": round(statistics.median(many / one for one, many in zip(rates[1], rates[8], strict=True)), 2),
    }


def measure_faults(model: Path, inputs: list[Sample], seconds: float, folder: Path) -> Results:
    """A worker is killed every two seconds under load."""
    killed = 0

    async def kill(server: Served, until: float) -> None:
        nonlocal killed
        while time.monotonic() < until:
            await asyncio.sleep(2)
            alive = await asyncio.to_thread(server.metric, "internimage_workers")
            if alive == 2:  # both have loaded the model: what is tested is a loss, not a start
                os.kill(server.workers()[killed % 2], signal.SIGKILL)
                killed += 1

    async def run(server: Served) -> Report:
        report, _ = await asyncio.gather(
            load.run(server.port, inputs, clients=24, seconds=seconds), kill(server, time.monotonic() + seconds - 2)
        )
        return report

    with Served(model, folder, *OPTIONS, "--workers", "2", "--queue", "500") as server:
        report = asyncio.run(run(server))
        return {"workers killed": killed, **report.summary(), "problems": report.wrong[:5]}


def measure_fuzzing(model: Path, count: int, folder: Path) -> Results:
    """Damaged requests, and requests made from the OpenAPI page."""
    with Served(model, folder, "--name", "color", "--body-timeout", "0.5", "--deadline", "600") as server:
        workers = server.workers()
        problems: list[tuple[object, bytes]] = []
        started = time.monotonic()
        verdicts = asyncio.run(fuzz.run(server.port, count, seed=20, problems=problems))
        seconds = time.monotonic() - started
        settings = folder / "schemathesis.toml"
        settings.write_text('[parameters]\n"path.model" = "color"\n"path.version" = "1"\n')
        openapi = fuzz.schemathesis(server.url, settings, examples=100)
        return {
            "mutations": count,
            "seconds": round(seconds, 1),
            "statuses": {str(status): number for status, number in sorted(verdicts.items(), key=str)},
            "problems": [[str(outcome), request[:200].decode("latin-1")] for outcome, request in problems[:10]],
            "number of problems": len(problems),
            "schemathesis": [line.strip() for line in openapi.stdout.splitlines() if " generated, " in line][-1:],
            "schemathesis passed": openapi.returncode == 0,
            "same workers": server.workers() == workers,
            "tracebacks in the log": server.log.count("Traceback"),
        }


def count_problems(results: Results, stages: list[str]) -> int:
    """Number of responses that were lost, wrong or above 499, and of tracebacks."""
    problems = sum(results[stage].get("lost or wrong", 0) for stage in stages)
    if "fuzz" in stages:
        fuzzed = results["fuzz"]
        problems += fuzzed["number of problems"] + fuzzed["tracebacks in the log"]
        problems += not fuzzed["schemathesis passed"]
    return int(problems)


def main() -> None:
    """Run the stages and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="ONNX file to serve")
    parser.add_argument(
        "--images", "--pictures", dest="images", type=Path, required=True, help="folder of images to send"
    )
    parser.add_argument("--clients", type=int, default=200, help="number of clients under load  [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=60, help="duration of the load  [default: %(default)s]")
    parser.add_argument(
        "--mutations", type=int, default=10_000, help="number of damaged requests  [default: %(default)s]"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=("load", "batching", "faults", "fuzz", "attacks"),
        help="stage to run; may be repeated  [default: all]",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    inputs = samples(options.model, options.images)
    height, width = inputs[0].labels.shape
    size = sum(len(sample.data) for sample in inputs) // len(inputs)
    results: Results = environment(HERE)
    results["versions"] |= {name: version(name) for name in PACKAGES}
    results |= {
        "model": options.model.name,
        "pictures": f"{len(inputs)} PNG of {width}x{height}, {size >> 10} KiB",
        "service": f"{' '.join(OPTIONS)}, else defaults; clients and service on one machine",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages: dict[str, Callable[[], Results]] = {
            "load": lambda: measure_load(options.model, inputs, options.clients, options.seconds, folder),
            "batching": lambda: measure_batching(options.model, inputs, options.seconds / 10, folder),
            "faults": lambda: measure_faults(options.model, inputs, min(options.seconds / 3, 20), folder),
            "fuzz": lambda: measure_fuzzing(options.model, options.mutations, folder),
            "attacks": lambda: measure_attacks(options.model, min(options.seconds / 6, 10), folder, OPTIONS),
        }
        selected = options.only or list(stages)
        for stage in selected:
            print(f"== {stage}", flush=True)
            results[stage] = stages[stage]()
            print(json.dumps(results[stage], indent=1), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    problems = count_problems(results, selected)
    print(f"wrote {options.output}: {f'{problems} problems' if problems else 'as it should be'}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
