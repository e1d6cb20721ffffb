# SPDX-License-Identifier: Apache-2.0
"""`export-triton`: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from internimage_deploy.cli.options import FilePath, Number, Option, model_argument
from internimage_deploy.runtime.engine.engine_backend import ENGINE_SUFFIXES

_DEFAULT_DELAY_MS = 5.0
_RELEASE = "25.06"  # of Triton: any recent one runs an ONNX model; deploy/compose.yaml names the same


_EXAMPLES = """\b
Examples:
  internimage-deploy export-triton model.onnx -o repository --name street
  internimage-deploy export-triton model.engine -o repository --plugin libinternimage_trt_plugins.so
"""


@click.command(epilog=_EXAMPLES)
@model_argument
@click.option(
    "-o",
    "--output",
    "repository",
    required=True,
    metavar="REPOSITORY",
    type=FilePath,
    help="Model repository to write into; it is created if it does not exist.",
)
@click.option("--name", help="Name of the model and of its folder in the repository.  [default: from the file's name]")
@click.option(
    "--batch",
    cls=Option,
    aliases=("--max-batch",),
    type=click.IntRange(1, 1024),
    default=8,
    show_default=True,
    help="Maximum number of images in one run of the network; a model of fixed batch size ignores it.",
)
@click.option(
    "--delay-ms",
    type=Number(0),
    help="Maximum time in milliseconds that an image waits for others to form a batch.  "
    f"[default: {_DEFAULT_DELAY_MS:g}]",
)
@click.option("--delay", "delay_us", type=click.IntRange(0), hidden=True)  # microseconds, in earlier versions
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Maximum number of images waiting in the queue; further ones are rejected.",
)
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Number of copies of the model that run at the same time.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="Device that runs the copies; an engine always runs on the GPU.",
)
@click.option(
    "--plugin",
    type=FilePath,
    help="Compiled plugin library, for an engine that does not carry the plugins.  "
    "[default: the one beside the engine]",
)
def export_triton(
    model: Path,
    repository: Path,
    name: str | None,
    batch: int,
    delay_ms: float | None,
    delay_us: int | None,
    queue: int,
    instances: int,
    device: Literal["auto", "cpu", "gpu"],
    plugin: Path | None,
) -> None:
    """Write MODEL into a Triton model repository and print how to start the server.

    MODEL must take uint8 images and return labels (`export-onnx --input uint8 --emit labels`, the default), because
    Triton runs the network only; or it is a TensorRT engine built from such a file.
    """
    from internimage_deploy.runtime.serving.settings import model_name
    from internimage_deploy.runtime.serving.triton import TritonOptions, export

    if delay_us is None:
        delay_us = round(1000 * (_DEFAULT_DELAY_MS if delay_ms is None else delay_ms))
    elif delay_ms is not None:
        raise click.UsageError("--delay (microseconds) is the old form of --delay-ms; use --delay-ms alone")
    settings = TritonOptions(
        name=model_name(Path(f"{name}.x") if name else model),
        max_batch=batch,
        delay_us=delay_us,
        queue=queue,
        instances=instances,
        device=device,
        plugin=plugin,
    )
    commands = export(model, repository, settings)
    is_engine = model.suffix.lower() in ENGINE_SUFFIXES
    note = ", with the Triton release whose TensorRT built the engine in place of YY.MM" if is_engine else ""
    click.echo(f"wrote {repository / settings.name}; to start it{note}:")
    for command in commands:
        click.echo(f"  {command if is_engine else command.replace('YY.MM', _RELEASE)}")
