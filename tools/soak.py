# SPDX-License-Identifier: Apache-2.0
"""`make soak`: a minute of 200 clients, batched against unbatched, workers killed under load, 10,000 mutations.

The figures go to a JSON file with the conditions they were measured under. Exit code 1 if an answer was lost, wrong,
or above 499 without being an announced refusal.
"""

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
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]

import numpy as np  # noqa: E402

from internimage_deploy.environment import environment  # noqa: E402
from internimage_deploy.runtime.imaging.image_io import read_image  # noqa: E402
from internimage_deploy.runtime.segmenter import Segmenter  # noqa: E402
from internimage_deploy.runtime.serving.http import image_codec as pictures  # noqa: E402
from support import fuzz, load  # noqa: E402
from support.served import Served, decoded, encoded  # noqa: E402

PACKAGES = ("fastapi", "opencv-python-headless", "pillow", "uvicorn")
ROUNDS = 3
BACKEND = "onnxruntime"
OPTIONS = ("--backend", BACKEND, "--threads", "1")


def samples(model, folder):
    """The pictures of `folder` with the answers of direct calls."""
    segmenter = Segmenter.load(model, backend=BACKEND, threads=1)
    made = []
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png")):
        labels = segmenter(image := read_image(path)).labels
        made.append(load.Sample(encoded(image), pictures.png(labels), labels))
    return made


async def watched(server, coroutine, interval_s=1.0):
    """The result of `coroutine`, and the service's memory every second meanwhile."""
    task, memory = asyncio.ensure_future(coroutine), []
    while not task.done():
        memory.append(await asyncio.to_thread(server.resident_bytes))
        await asyncio.wait({task}, timeout=interval_s)
    return task.result(), memory


def soak(model, given, clients, seconds, folder):
    """200 clients against a bounded queue: what is refused is refused at once, the rest is right."""
    with Served(model, folder, *OPTIONS) as server:
        asyncio.run(load.run(server.port, given, clients=8, each=4))
        with multiprocessing.get_context("spawn").Pool(1) as apart:
            apart.apply(time.sleep, (0,))  # started before it counts
            seen = apart.apply_async(load.probe, (server.port, given[0].picture, seconds))
            before = server.cpu_seconds(), time.process_time()
            found, memory = asyncio.run(watched(server, load.run(server.port, given, clients=clients, seconds=seconds)))
            front, workers = (round(after - b, 1) for after, b in zip(server.cpu_seconds(), before[0], strict=True))
            probed = [took for status, took in seen.get() if status == 503]
        quarter = max(len(memory) // 4, 1)
        sizes = server.metric("internimage_batch_size_sum"), server.metric("internimage_batch_size_count")
        return {
            "clients": clients,
            "seconds": round(found.seconds, 1),
            **found.summary(),
            "refused_ms, seen by a single client in a process of its own": load.percentiles(probed),
            "cpu_s": {"front": front, "worker": workers, "clients": round(time.process_time() - before[1], 1)},
            "problems": found.wrong[:5],
            "mean batch": round(sizes[0] / sizes[1], 2),
            "memory_mb": {
                "second quarter": round(statistics.median(memory[quarter : 2 * quarter]) / 2**20),
                "last quarter": round(statistics.median(memory[-quarter:]) / 2**20),
                "highest": round(max(memory) / 2**20),
            },
        }


def throughput(model, given, seconds, folder):
    """Answers per second with and without batches, by turns; 32 clients, nothing refused. And the network's own."""
    found = {1: [], 8: []}
    with contextlib.ExitStack() as stack:
        servers = {}
        for batch in found:
            (folder / str(batch)).mkdir()
            options = (*OPTIONS, "--batch", batch, "--queue", "1000")
            servers[batch] = stack.enter_context(Served(model, folder / str(batch), *options))
            asyncio.run(load.run(servers[batch].port, given, clients=8, each=4))
        for _ in range(ROUNDS):
            for batch, server in servers.items():
                found[batch].append(asyncio.run(load.run(server.port, given, clients=32, seconds=seconds)))
    rates = {batch: [len(turn.answered) / turn.seconds for turn in turns] for batch, turns in found.items()}
    return {
        "answered per second": spread(rates),
        "the network alone, pictures per second": spread(network(model, given)),
        "lost or wrong": sum(len(turn.wrong) for turns in found.values() for turn in turns),
        "problems": [problem for turns in found.values() for turn in turns for problem in turn.wrong][:5],
    }


def network(model, given):
    """Pictures per second of the network on one thread, by batch, with neither HTTP nor files."""
    segmenters = {batch: Segmenter.load(model, backend=BACKEND, threads=1, batch=batch) for batch in (1, 8)}
    prepared = [segmenters[1].prepare(np.asarray(decoded(sample.picture))) for sample in given[:24]]
    rates = {batch: [] for batch in segmenters}
    for turn in range(2 * ROUNDS + 1):
        for batch, segmenter in segmenters.items():
            began = time.perf_counter()
            for start in range(0, len(prepared), batch):
                segmenter.forward(prepared[start : start + batch])
            if turn:  # the first warms up
                rates[batch].append(len(prepared) / (time.perf_counter() - began))
    return rates


def spread(rates):
    """Medians by batch, all turns, and the median of the turns' ratios: the machine may change its speed."""
    middle = {batch: statistics.median(turns) for batch, turns in rates.items()}
    return {
        **{f"batch {batch}": round(rate, 1) for batch, rate in middle.items()},
        "turns": {f"batch {batch}": [round(rate, 1) for rate in turns] for batch, turns in rates.items()},
        "ratio": round(statistics.median(many / one for one, many in zip(rates[1], rates[8], strict=True)), 2),
    }


def faults(model, given, seconds, folder):
    """A worker killed every two seconds under load."""
    killed = 0

    async def kill(server, until):
        nonlocal killed
        while time.monotonic() < until:
            await asyncio.sleep(2)
            alive = await asyncio.to_thread(server.metric, "internimage_workers")
            if alive == 2:  # both have loaded the model: what is tested is a loss, not a start
                os.kill(server.workers()[killed % 2], signal.SIGKILL)
                killed += 1

    async def both(server):
        found, _ = await asyncio.gather(
            load.run(server.port, given, clients=24, seconds=seconds), kill(server, time.monotonic() + seconds - 2)
        )
        return found

    with Served(model, folder, *OPTIONS, "--workers", "2", "--queue", "500") as server:
        found = asyncio.run(both(server))
        return {"workers killed": killed, **found.summary(), "problems": found.wrong[:5]}


def mutate(model, count, folder):
    """Random damage and requests from the OpenAPI page."""
    with Served(model, folder, "--name", "color", "--body-timeout", "0.5", "--deadline", "600") as server:
        workers, problems = server.workers(), []
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


def main() -> None:
    """Run every load and fault, write the figures, exit with 1 if anything was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures to send")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--only", action="append", help="one stage")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    given = samples(options.model, options.pictures)
    height, width = given[0].labels.shape
    size = sum(len(sample.picture) for sample in given) // len(given)
    results = environment(HERE)
    results["versions"] |= {name: version(name) for name in PACKAGES}
    results |= {
        "model": options.model.name,
        "pictures": f"{len(given)} PNG of {width}x{height}, {size >> 10} KiB",
        "service": f"{' '.join(OPTIONS)}, else defaults; clients and service on one machine",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stages = {
            "load": lambda: soak(options.model, given, options.clients, options.seconds, folder),
            "batching": lambda: throughput(options.model, given, options.seconds / 10, folder),
            "faults": lambda: faults(options.model, given, min(options.seconds / 3, 20), folder),
            "fuzz": lambda: mutate(options.model, options.mutations, folder),
        }
        for title in options.only or stages:
            print(f"== {title}", flush=True)
            results[title] = stages[title]()
            print(json.dumps(results[title], indent=1), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    bad = sum(results[title].get("lost or wrong", 0) for title in stages if title in results)
    if "fuzz" in results:
        fuzzed = results["fuzz"]
        bad += fuzzed["number of problems"] + fuzzed["tracebacks in the log"] + (not fuzzed["schemathesis passed"])
    print(f"wrote {options.output}: {'as it should be' if not bad else f'{bad} problems'}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
