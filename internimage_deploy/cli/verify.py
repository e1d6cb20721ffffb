# SPDX-License-Identifier: Apache-2.0
"""`verify`: is a model file sound, and does it agree with another one."""

from __future__ import annotations

from pathlib import Path

import click

from internimage_deploy.cli.options import Size, backend_option, model_argument, threads_option
from internimage_deploy.errors import UserError


@click.command()
@model_argument
@click.option("--against", type=click.Path(path_type=Path), help="Another model file to compare with.")
@click.option("--against-backend", help="What runs the other one (or this file again, without --against).")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=Size("HxW"),
    help="Input size to run at; may be repeated.  [default: the model's own, or three sizes where it takes any]",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(0, 1),
    default=0.99,
    show_default=True,
    help="Least share of pixels with the same label.",
)
@click.option(
    "--max-error",
    type=click.FloatRange(0),
    help="Largest difference of logits.  [default: 1e-3 of the largest logit, if both models are float32]",
)
@backend_option
@threads_option
def verify(
    model: Path,
    against: Path | None,
    against_backend: str | None,
    sizes: tuple[tuple[int, int], ...],
    min_agreement: float,
    max_error: float | None,
    backend: str,
    threads: int | None,
) -> None:
    """Check a model file: ONNX rules, card against graph, runs on random pictures, comparison with another file."""
    from internimage_deploy.runtime import verification
    from internimage_deploy.runtime.backends.load import load_backend
    from internimage_deploy.runtime.backends.registry import REGISTRY

    if against_backend not in (None, "auto", *REGISTRY):
        raise click.BadParameter(f"choose one of: auto, {', '.join(REGISTRY)}", param_hint="--against-backend")
    if model.suffix.lower() == ".onnx":
        verification.check_file(model)
        click.echo(f"{model}: follows the ONNX rules; the model card fits the graph")
    network = load_backend(model, backend, threads=threads)
    sizes = sizes or verification.default_sizes(network.card)
    for size in sizes:
        run = verification.run_alone(network, size)
        click.echo(
            f"{size[0]}x{size[1]}, batch {run.batch}: {run.shape} {run.dtype} in {run.milliseconds:.0f} ms"
            + ("" if run.batch_error is None else f"; alone and in a batch: {run.batch_error}")
        )
    if against is None and against_backend is None:
        return
    other = load_backend(against or model, against_backend or "auto", threads=threads)
    failures = []
    for size in sizes:
        result = verification.compare(network, other, size)
        error = "" if result.max_error is None else f", max error {result.max_error:.2g}"
        click.echo(f"{size[0]}x{size[1]}: {result.agreement:.4%} of the labels agree{error}")
        limit = max_error if max_error is not None else result.usual_limit
        if result.agreement < min_agreement:
            wanted = f"expected at least {min_agreement:.2%}"
            failures.append(f"{size[0]}x{size[1]}: {result.agreement:.4%} of the labels agree, {wanted}")
        elif limit is not None and result.max_error is not None and not result.max_error <= limit:
            failures.append(f"{size[0]}x{size[1]}: max error {result.max_error:.2g}, expected at most {limit:.2g}")
    if failures:
        raise UserError(f"{model.name} and {(against or model).name} disagree at {'; '.join(failures)}")
