# SPDX-License-Identifier: Apache-2.0
"""`verify`: checks of a model file, and its comparison with another one or in another backend."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from internimage_deploy.cli.options import (
    BACKEND,
    FilePath,
    Size,
    backend_option,
    engine_options,
    model_argument,
    threads_option,
)
from internimage_deploy.errors import UserError


@click.command()
@model_argument
@click.option("--against", type=FilePath, help="Second model file, an ONNX file or an engine, to compare MODEL with.")
@click.option(
    "--against-backend",
    type=BACKEND,
    help="Backend of the second model; without --against, MODEL itself is run in this backend for the comparison.  "
    "[default: auto]",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=Size("HxW"),
    help="Input size to run the models at; may be repeated.  [default: the model's own; of an engine the smallest "
    "and typical ones of its profiles; three sizes where the model takes any]",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    default=0.99,
    show_default=True,
    help="Minimum fraction of pixels to which both models assign the same label.",
)
@click.option(
    "--max-error",
    type=click.FloatRange(0),
    help="Maximum difference between the logits of both models.  [default: 1e-3 of the largest logit, if both are "
    "float32]",
)
@backend_option
@threads_option
@engine_options
def verify(
    model: Path,
    against: Path | None,
    against_backend: str | None,
    sizes: tuple[tuple[int, int], ...],
    min_agreement: float,
    max_error: float | None,
    backend: str,
    threads: int | None,
    trust_engine: bool,
    cuda_graphs: bool,
) -> None:
    """Check MODEL: ONNX rules, card against graph, runs on random images, and comparison with a second model."""
    from internimage_deploy.runtime import verification
    from internimage_deploy.runtime.backends.load import load_backend

    load = partial(load_backend, threads=threads, trust_engine=trust_engine, cuda_graphs=cuda_graphs)
    if model.suffix.lower() == ".onnx":
        verification.check_file(model)
        click.echo(f"{model}: follows the ONNX rules; the model card fits the graph")
    network = load(model, backend)
    sizes = sizes or verification.default_sizes(network.card)
    for size in sizes:
        run = verification.run_alone(network, size)
        click.echo(
            f"{size[0]}x{size[1]}, batch {run.batch}: {run.shape} {run.dtype} in {run.milliseconds:.0f} ms"
            + ("" if run.batch_difference is None else f"; single images against a batch: {run.batch_difference}")
        )
    if against is None and against_backend is None:
        return
    second = load(against or model, against_backend or "auto")
    failures = []
    for size in sizes:
        result = verification.compare(network, second, size)
        error = "" if result.max_error is None else f", max error {result.max_error:.2g}"
        click.echo(f"{size[0]}x{size[1]}: {result.agreement:.4%} of the labels agree{error}")
        limit = max_error if max_error is not None else result.default_limit
        if result.agreement < min_agreement:
            expected = f"expected at least {min_agreement:.2%}"
            failures.append(f"{size[0]}x{size[1]}: {result.agreement:.4%} of the labels agree, {expected}")
        elif limit is not None and result.max_error is not None and not result.max_error <= limit:
            failures.append(f"{size[0]}x{size[1]}: max error {result.max_error:.2g}, expected at most {limit:.2g}")
    if failures:
        raise UserError(f"{model.name} and {(against or model).name} disagree at {'; '.join(failures)}")
