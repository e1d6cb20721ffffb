# SPDX-License-Identifier: Apache-2.0
"""`benchmark`: how long a model takes on this machine, in one backend or several."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy.typing as npt

from internimage_deploy.cli.options import Size, model_argument, threads_option


@click.command()
@model_argument
@click.option("--backend", "backends", multiple=True, help="What runs it; may be repeated, then in turns.")
@click.option("--size", type=Size("HxW"), help="Input size of a model that takes any.  [default: 512x512]")
@click.option(
    "--batch", type=click.IntRange(1), help="Pictures in a run.  [default: the model's own, 1 where it is free]"
)
@click.option("--runs", type=click.IntRange(3), default=10, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@threads_option
def benchmark(
    model: Path,
    backends: tuple[str, ...],
    size: tuple[int, int] | None,
    batch: int | None,
    runs: int,
    warmup: int,
    as_json: bool,
    threads: int | None,
) -> None:
    """Time the network alone (no decoding, no resizing); the backends' answers are compared first."""
    from internimage_deploy.environment import environment
    from internimage_deploy.errors import UserError
    from internimage_deploy.runtime.backends.fastest import sample
    from internimage_deploy.runtime.backends.load import load_backend
    from internimage_deploy.runtime.backends.registry import REGISTRY
    from internimage_deploy.runtime.verification import check_size
    from internimage_deploy.timing import measure

    for name in backends:
        if name not in ("auto", *REGISTRY):
            raise click.BadParameter(f"'{name}': choose among auto, {', '.join(REGISTRY)}", param_hint="--backend")
    networks = [load_backend(model, name, threads=threads) for name in backends or ("auto",)]
    card = networks[0].card
    if size is not None:
        check_size(card, size)
    if batch not in (None, card.batch) and card.batch is not None:
        raise UserError(f"{model}: takes batches of {card.batch} only, got --batch {batch}; leave it out")
    given = sample(card, size, batch or 1)
    answers = [network.run(given) for network in networks]
    differing = {
        network.name: float((_labels(answer, card.emits_labels) != _labels(answers[0], card.emits_labels)).mean())
        for network, answer in zip(networks, answers, strict=True)
    }
    times = measure({network.name: partial(network.run, given) for network in networks}, runs=runs, warmup=warmup)
    if as_json:
        rows = {name: {**timing.asdict(), "labels_differ": differing[name]} for name, timing in times.items()}
        click.echo(json.dumps({**environment(), "input": list(given.shape), "backends": rows}, indent=1))
        return
    for name, timing in times.items():
        click.echo(
            f"{name}: median {timing.median_ms:.1f} ms, p95 {timing.p95_ms:.1f} ms, CoV {100 * timing.cv:.1f} %, "
            f"labels that differ from {networks[0].name}'s {100 * differing[name]:.3f} %"
        )
        if timing.unstable:
            click.echo("warning: the runs differ by more than 10 %; is the machine busy?", err=True)


def _labels(answer: npt.NDArray[Any], emits_labels: bool) -> npt.NDArray[Any]:
    return answer if emits_labels else answer.argmax(1)
