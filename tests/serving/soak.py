# SPDX-License-Identifier: Apache-2.0
"""`make soak`: a minute of 200 clients, batched against unbatched, workers killed under load, 10,000 mutations.

The figures go to a JSON file with the conditions they were measured under. Exit code 1 if an answer was lost, wrong,
or above 499 without being an announced refusal.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "runtime"), str(HERE.parents[1])]

import fuzz  # noqa: E402
import load  # noqa: E402
import numpy as np  # noqa: E402
from served import Served, encoded  # noqa: E402
from tiny_models import color_model  # noqa: E402

from internimage_deploy.runtime.images import read_image  # noqa: E402
from internimage_deploy.runtime.segmenter import Segmenter  # noqa: E402
from internimage_deploy.runtime.serving import pictures  # noqa: E402


def samples(model, folder, count=32):
    """Pictures of `folder`, or made ones, each different, with the answers of direct calls."""
    segmenter = Segmenter.load(model, threads=1)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))[:count] if folder else []
    made = []
    for number in range(count):
        if files:
            image = read_image(files[number % len(files)])
            image = np.roll(image, 17 * (number // len(files)), axis=1)
        else:
            rng = np.random.default_rng(number)
            image = np.repeat(np.repeat(rng.integers(0, 256, (8, 8, 3), np.uint8), 16, axis=0), 16, axis=1)
        labels = segmenter(image).labels
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
    with Served(model, folder, "--threads", "1", "--workers", "1") as server:
        asyncio.run(load.run(server.port, given, clients=8, each=4))
        report, memory = asyncio.run(watched(server, load.run(server.port, given, clients=clients, seconds=seconds)))
        quarter = max(len(memory) // 4, 1)
        middle, end = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
        sizes = server.metric("internimage_batch_size_sum"), server.metric("internimage_batch_size_count")
        return {
            "clients": clients,
            "seconds": round(report.seconds, 1),
            **report.summary(),
            "problems": report.wrong[:5],
            "mean batch": round(sizes[0] / sizes[1], 2),
            "memory_mb": {"second quarter": middle >> 20 if isinstance(middle, int) else round(middle / 2**20),
                          "last quarter": round(end / 2**20), "highest": max(memory) >> 20},
        }  # fmt: skip


def throughput(model, given, batch, seconds, folder):
    """Answers per second with at most `batch` pictures in a run; 32 clients, nothing refused."""
    options = ("--threads", "1", "--batch", batch, "--queue", "1000")
    with Served(model, folder, *options) as server:
        asyncio.run(load.run(server.port, given, clients=8, each=4))
        report = asyncio.run(load.run(server.port, given, clients=32, seconds=seconds))
        assert not report.wrong, report.wrong[:3]
        return {"batch": batch, **report.summary()}


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
        report, _ = await asyncio.gather(
            load.run(server.port, given, clients=24, seconds=seconds), kill(server, time.monotonic() + seconds - 2)
        )
        return report

    with Served(model, folder, "--threads", "1", "--workers", "2", "--queue", "500") as server:
        report = asyncio.run(both(server))
        return {"workers killed": killed, **report.summary(), "problems": report.wrong[:5]}


def mutate(count, folder):
    """Random damage and requests from the OpenAPI page."""
    model = color_model(folder / "color.onnx")
    with Served(model, folder, "--body-timeout", "0.5", "--deadline", "600") as server:
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: a made model whose class is the strongest colour")
    parser.add_argument("--pictures", type=Path, help="folder of pictures to send; default: made ones")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--only", action="append", help="one stage; the others' figures stay as they are in the file")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.only and options.output.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or color_model(folder / "color.onnx")
        given = samples(model, options.pictures)
        short = min(options.seconds / 3, 20)
        stages = {
            "load": lambda: soak(model, given, options.clients, options.seconds, folder),
            "batched": lambda: throughput(model, given, 8, short, folder),
            "unbatched": lambda: throughput(model, given, 1, short, folder),
            "faults": lambda: faults(model, given, short, folder),
            "fuzz": lambda: mutate(options.mutations, folder),
        }
        for title in options.only or stages:
            print(f"== {title}", flush=True)
            results[title] = {"conditions": conditions(model, given, options.note), **stages[title]()}
            print(json.dumps(results[title], indent=1), flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    if {"batched", "unbatched"} <= set(results):
        rates = [results[title]["answered per second"] for title in ("batched", "unbatched")]
        results["batched over unbatched"] = round(rates[0] / rates[1], 2)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    bad = sum(results[title].get("lost or wrong", 0) for title in results if title in stages)
    if "fuzz" in results:
        fuzzed = results["fuzz"]
        bad += fuzzed["number of problems"] + fuzzed["tracebacks in the log"] + (not fuzzed["schemathesis passed"])
    print(f"wrote {options.output}: {'as it should be' if not bad else f'{bad} problems'}")
    sys.exit(bool(bad))


def conditions(model, given, note):
    """What the machine was, and was doing, when a stage began."""
    return {
        "model": model.name,
        "pictures": f"{len(given)} of {given[0].labels.shape[1]}x{given[0].labels.shape[0]}",
        "cpus": len(os.sched_getaffinity(0)),
        "load average before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "clients and service": "on the same machine",
        "note": note,
    }


if __name__ == "__main__":
    main()
