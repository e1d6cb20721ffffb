# SPDX-License-Identifier: Apache-2.0
"""`verify`: checks of a model file, and its comparison with another one or in another backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from internimage_deploy.cli.options import (
    BACKEND,
    FilePath,
    Number,
    Size,
    backend_option,
    engine_options,
    model_argument,
    threads_option,
)
from internimage_deploy.errors import UserError, escaped

if TYPE_CHECKING:
    from internimage_deploy.runtime.backends.base import Backend
    from internimage_deploy.runtime.verification import ImageComparison

_EXAMPLES = """\b
Examples:
  internimage-deploy verify model.onnx
  internimage-deploy verify model.onnx --against model.engine --images val/images
  internimage-deploy verify model.onnx --against-backend openvino-bf16 --images val/images
"""


@click.command(epilog=_EXAMPLES)
@model_argument
@click.option("--against", type=FilePath, help="Second model file, an ONNX file or an engine, to compare MODEL with.")
@click.option(
    "--against-backend",
    type=BACKEND,
    help="Backend that runs the second model. Without --against, the second model is MODEL itself, so that two "
    "backends are compared.  [default: the one of --backend where it reads the file, else auto]",
)
@click.option(
    "--images",
    type=FilePath,
    metavar="FOLDER|IMAGE",
    help="Also compare the labels of both models on these images, each resized as its model card says.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    type=Size("HxW"),
    help="Input size to run the models at on random images; may be repeated.  [default: the size that either model is "
    "fixed to; of an engine the smallest and typical ones of its profiles; three sizes where the models take any]",
)
@click.option(
    "--min-agreement",
    type=Number(0, 1),
    default=0.99,
    show_default=True,
    help="Minimum fraction of pixels to which both models assign the same label, at each size and over all images.",
)
@click.option(
    "--max-error",
    type=Number(0),
    help="Maximum difference between the logits of both models on random images.  [default: 1e-3 of the largest logit, "
    "if both are float32]",
)
@backend_option
@threads_option
@engine_options
def verify(
    model: Path,
    against: Path | None,
    against_backend: str | None,
    images: Path | None,
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
    from internimage_deploy.runtime.backends.load import load_backend, model_card
    from internimage_deploy.runtime.backends.registry import choose, reads

    if images is not None and against is None and against_backend is None:
        raise click.UsageError("--images compares two models; name the second with --against or --against-backend")
    load = partial(load_backend, threads=threads, trust_engine=trust_engine, cuda_graphs=cuda_graphs)
    # Everything that can be wrong with the files is found before anything runs.
    card = model_card(model)
    choose(model, backend)
    common = sizes
    files: list[Path] = []
    if against is not None or against_backend is not None:
        against = against or model
        against_backend = against_backend or (backend if reads(backend, against) else "auto")
        choose(against, against_backend)
        other = card if against == model else model_card(against)
        verification.check_comparable(card, other)
        common = sizes or verification.common_sizes(card, other)
        files = _image_files(images) if images is not None else []
        if not common and not files:
            raise UserError(
                f"{model.name} and {against.name} take no input size in common; compare their labels on images with "
                "--images FOLDER"
            )
        for size in sizes:
            verification.check_size(other, size)
    sizes = sizes or common or verification.default_sizes(card)
    for size in sizes:
        verification.check_size(card, size)
    if model.suffix.lower() == ".onnx":
        verification.check_file(model)
        click.echo(escaped(f"{model}: follows the ONNX rules; the model card fits the graph"))
    network = load(model, backend)
    second = None if against is None or against_backend is None else load(against, against_backend)
    for size in sizes:
        run = verification.run_alone(network, size)
        click.echo(
            f"{size[0]}x{size[1]}, batch {run.batch}: {run.shape} {run.dtype} in {run.milliseconds:.0f} ms"
            + ("" if run.batch_difference is None else f"; single images against a batch: {run.batch_difference}")
        )
    if second is None or against is None:
        return
    click.echo(escaped(f"comparing {model.name} ({network.name}) with {against.name} ({second.name})"))
    failures, unread = _compare_at_sizes(network, second, common, min_agreement, max_error), 0
    if files:
        disagreements, unread = _compare_on_images(network, second, files, min_agreement)
        failures += disagreements
    problems = [f"{model.name} and {against.name} disagree at {'; '.join(failures)}"] if failures else []
    if unread:
        problems.append(f"{unread} of {len(files)} images could not be compared; they are named above")
    if problems:
        raise UserError("; ".join(problems))


def _image_files(images: Path) -> list[Path]:
    """The image, or those in a folder. Raises `UserError` where there is none."""
    from internimage_deploy.runtime.pipelines.find import find_inputs

    found = find_inputs([str(images)])
    if not found.images:
        raise UserError(f"{images}: a video; --images takes an image or a folder of images")
    return [Path(str(image)) for image in found.images]


def _compare_at_sizes(
    first: Backend,
    second: Backend,
    sizes: Sequence[tuple[int, int]],
    min_agreement: float,
    max_error: float | None,
) -> list[str]:
    """Print how two models differ on random images of `sizes`, and return where they do by too much."""
    from internimage_deploy.runtime.verification import compare

    failures = []
    for size in sizes:
        result = compare(first, second, size)
        error = "" if result.max_error is None else f", max error {result.max_error:.2g}"
        click.echo(f"{size[0]}x{size[1]}: {result.agreement:.4%} of the labels agree{error}")
        limit = max_error if max_error is not None else result.default_limit
        if result.agreement < min_agreement:
            expected = f"expected at least {min_agreement:.2%}"
            failures.append(f"{size[0]}x{size[1]}: {result.agreement:.4%} of the labels agree, {expected}")
        elif limit is not None and result.max_error is not None and not result.max_error <= limit:
            failures.append(f"{size[0]}x{size[1]}: max error {result.max_error:.2g}, expected at most {limit:.2g}")
    return failures


def _compare_on_images(
    first: Backend, second: Backend, files: Sequence[Path], min_agreement: float
) -> tuple[list[str], int]:
    """Print how the labels of two models differ on image files; images that cannot be compared are named last.

    Returns:
        A text where the models differ by too much, and the number of images that were not compared.
    """
    from internimage_deploy.runtime.verification import compare_images

    results, failed = [], []
    for result in compare_images(first, second, files):
        if result.error:
            failed.append(result)
            continue
        click.echo(escaped(f"{result.name}: {result.agreement:.4%} of the labels agree"))
        results.append(result)
    failures = _overall(results, min_agreement) if results else []
    for result in failed:
        reason = result.error if result.name in result.error else f"{result.name}: {result.error}"
        click.echo(f"failed: {escaped(reason)}", err=True)
    return failures, len(failed)


def _overall(results: Sequence[ImageComparison], min_agreement: float) -> list[str]:
    """Print how the labels agree over all images, and return a text where they differ by too much."""
    overall = sum(r.agreement * r.pixels for r in results) / sum(r.pixels for r in results)
    worst = min(results, key=lambda r: r.agreement)
    count = f"{len(results)} image{'s' if len(results) > 1 else ''}"
    of_worst = f"the worst is {escaped(worst.name)} with {worst.agreement:.4%}"
    click.echo(f"{count}: {overall:.4%} of the labels agree; {of_worst}")
    if overall >= min_agreement:
        return []
    return [f"{count}: {overall:.4%} of the labels agree, expected at least {min_agreement:.2%}"]
