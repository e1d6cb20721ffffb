# SPDX-License-Identifier: Apache-2.0
"""What `segment` and `serve` have in common when they run on a Ray cluster, and `segment`'s way to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

Command = TypeVar("Command", bound=Callable[..., Any])


class Replicas(click.ParamType):
    """A number of copies, or a range such as "1-4" within which the cluster scales."""

    name = "N|MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, _, high = str(value).partition("-")
        high = high or low
        if not (low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high)):
            self.fail(f"got '{value}', expected a number or a range such as 1-4", param, ctx)
        return int(low), int(high)


class PathOrAddress(click.Path):
    """A path, or the address of an object store's prefix, which stays as it is."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in str(value) else super().convert(value, param, ctx)


def cluster_options(command: Command) -> Command:
    """--engine, --ray-address, --replicas, --gpus, --cpus."""
    for option in reversed(
        (
            click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                         help="This machine, or a Ray cluster."),
            click.option("--ray-address",
                         help="With --engine ray: the cluster; 'auto' for the running one.  [default: start one here]"),
            click.option("--replicas", type=Replicas(), default="1", show_default=True,
                         help="With --engine ray: copies of the model; a range scales with the load."),
            click.option("--gpus", type=click.FloatRange(0), default=0, show_default=True,
                         help="With --engine ray: GPUs of each copy, may be a fraction."),
            click.option("--cpus", type=click.FloatRange(0), default=1, show_default=True,
                         help="With --engine ray: CPUs of each copy."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def check_local(places: tuple[Path | str, ...] = ()) -> None:
    """Refuse what only a cluster understands: its options, and addresses of object stores."""
    context = click.get_current_context()
    for name in ("ray_address", "replicas", "gpus", "cpus"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect on this machine alone; add --engine ray")
    for place in places:
        if isinstance(place, str):
            store = place.partition("://")[0]
            raise click.UsageError(f"{store}://...: --engine ray reads object stores, this machine alone does not")


def segment_on_cluster(
    model: Path, inputs: tuple[Path | str, ...], output: Path | str, cluster: dict[str, Any], **options: Any
) -> None:
    """`segment --engine ray`; `cluster` holds the values of `cluster_options`, `options` the rest of `segment`'s."""
    from rich.console import Console
    from rich.progress import Progress

    from internimage_deploy.runtime.cluster import batch as distributed
    from internimage_deploy.runtime.options import LoadOptions
    from internimage_deploy.runtime.serving.settings import ModelSettings

    if len(inputs) != 1 or (isinstance(inputs[0], Path) and not inputs[0].is_dir()):
        raise click.UsageError("--engine ray takes one folder or one prefix such as s3://bucket/pictures")
    with Progress(console=Console(stderr=True), transient=True, disable=not os.isatty(2)) as bar:
        task = bar.add_task("segmenting")
        target = distributed.Place(str(output))
        report = distributed.segment(
            ModelSettings(
                model.absolute(),
                LoadOptions(
                    options["backend"],
                    options["threads"],
                    options["resize"],
                    options["window"],
                    trust_engine=options["trust_engine"],
                    cuda_graphs=options["cuda_graphs"],
                ),
            ),
            distributed.Place(str(inputs[0])),
            distributed.Outputs(target, options["overlay"], options["as_json"]),
            distributed.Cluster(cluster["ray_address"], cluster["replicas"], cluster["gpus"], cluster["cpus"]),
            recursive=options["recursive"],
            batch=options["batch"],
            max_pixels=options["max_pixels"],
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for source, reason in report.failed:
        click.echo(f"failed: {source}: {reason}", err=True)
    before = f", {report.skipped} were there already" if report.skipped else ""
    click.echo(f"segmented {report.done} of {report.done + len(report.failed)} pictures into {target}{before}")
