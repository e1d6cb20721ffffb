# SPDX-License-Identifier: Apache-2.0
"""`export-triton`: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from internimage_deploy.cli.options import model_argument


@click.command()
@model_argument
@click.option("-o", "--output", required=True, metavar="REPO", type=click.Path(path_type=Path),
              help="The model repository; made if it does not exist.")  # fmt: skip
@click.option("--name", help="The model's name and folder in the repository.  [default: the file's name]")
@click.option("--max-batch", type=click.IntRange(1, 1024), default=8, show_default=True, help="For a free batch.")
@click.option("--delay", type=click.IntRange(0), default=5000, show_default=True,
              help="Microseconds a picture waits for others.")  # fmt: skip
@click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Most pictures that wait.")
@click.option("--instances", type=click.IntRange(1, 64), default=1, show_default=True, help="Copies of the model.")
@click.option("--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True,
              help="Where the copies run; an engine always takes the GPU.")  # fmt: skip
@click.option("--plugin", type=click.Path(path_type=Path),
              help="The compiled DCNv3 plugin, for an engine that needs it.")  # fmt: skip
def export_triton(model: Path, output: Path, name: str | None, **options: Any) -> None:
    """Write MODEL into a Triton model repository and print how to start the server.

    MODEL takes pictures and answers labels (`export-onnx --input uint8 --emit labels`, the default), so that one step
    does it all; or is a TensorRT engine built from such a file.
    """
    from internimage_deploy.runtime.serving.settings import model_name
    from internimage_deploy.runtime.serving.triton import TritonOptions, export

    settings = TritonOptions(
        name=model_name(Path(f"{name}.x") if name else model),
        max_batch=options["max_batch"],
        delay_us=options["delay"],
        queue=options["queue"],
        instances=options["instances"],
        device=options["device"],
        plugin=options["plugin"],
    )
    commands = export(model, output, settings)
    click.echo(f"wrote {output / settings.name}; to start it (YY.MM is the release whose TensorRT built the model):")
    for command in commands:
        click.echo(f"  {command}")
