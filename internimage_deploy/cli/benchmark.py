# SPDX-License-Identifier: Apache-2.0
"""`benchmark`: how long a model takes on this machine, in one backend or several."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import click

from internimage_deploy.card import Array
from internimage_deploy.cli.options import BACKEND, Size, engine_options, model_argument, threads_option

_EXAMPLES = """\b
Examples:
  internimage-deploy benchmark model.onnx --size 512x1024
  internimage-deploy benchmark model.onnx --backend onnxruntime --backend openvino --json
"""


@click.command(epilog=_EXAMPLES)
@model_argument
@click.option(
    "--backend",
    "backends",
    type=BACKEND,
    multiple=True,
    help="Backend to time; repeat to compare several in interleaved runs.  [default: auto]",
)
@click.option(
    "--size",
    type=Size("HxW"),
    help="Input size of a model that takes any.  [default: the size that an engine is tuned for, else 512x512]",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Number of images per run.  [default: the smallest that the model takes]",
)
@click.option("--runs", type=click.IntRange(3), default=10, show_default=True, help="Number of timed runs per backend.")
@click.option(
    "--warmup", type=click.IntRange(0), default=2, show_default=True, help="Number of runs per backend before those."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@threads_option
@engine_options
def benchmark(
    model: Path,
    backends: tuple[str, ...],
    size: tuple[int, int] | None,
    batch: int | None,
    runs: int,
    warmup: int,
    as_json: bool,
    threads: int | None,
    trust_engine: bool,
    cuda_graphs: bool,
) -> None:
    """Time the network of MODEL alone, without decoding and resizing, after comparing the backends' outputs."""
    from internimage_deploy.environment import environment
    from internimage_deploy.errors import UserError
    from internimage_deploy.runtime.backends.fastest import sample
    from internimage_deploy.runtime.backends.load import load_backend
    from internimage_deploy.runtime.verification import check_size
    from internimage_deploy.timing import measure

    networks = [
        load_backend(model, name, threads=threads, trust_engine=trust_engine, cuda_graphs=cuda_graphs)
        for name in backends or ("auto",)
    ]
    card = networks[0].card
    if size is not None:
        check_size(card, size)
    if batch not in (None, card.batch) and card.batch is not None:
        raise UserError(f"{model}: takes batches of {card.batch} only, got --batch {batch}; leave it out")
    images = sample(card, size, batch)
    labels = [_labels(network.run(images), card.emits_labels) for network in networks]
    differing = {
        network.name: float((found != labels[0]).mean()) for network, found in zip(networks, labels, strict=True)
    }
    times = measure({network.name: partial(network.run, images) for network in networks}, runs=runs, warmup=warmup)
    if as_json:
        rows = {name: {**timing.asdict(), "labels_differ": differing[name]} for name, timing in times.items()}
        click.echo(json.dumps({**environment(), "input": list(images.shape), "backends": rows}, indent=1))
        return
    for name, timing in times.items():
        line = f"{name}: median {timing.median_ms:.1f} ms, p95 {timing.p95_ms:.1f} ms, "
        line += f"variation {100 * timing.cv:.1f} %"
        if name != networks[0].name:
            line += f", labels that differ from {networks[0].name}'s {100 * differing[name]:.3f} %"
        click.echo(line)
        if timing.unstable:
            click.echo("warning: the runs differ by more than 10 %; is the machine busy?", err=True)


def _labels(output: Array, emits_labels: bool) -> Array:
    return output if emits_labels else output.argmax(1)
