# SPDX-License-Identifier: Apache-2.0
"""The options of `segment` and `serve` for a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from internimage_deploy.cli.options import Number, Option, apply_options

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


def cluster_options(command: Command) -> Command:
    """--executor, --ray-address, --replicas, --gpus, --cpus."""
    return apply_options(
        click.option(
            "--executor",
            cls=Option,
            aliases=("--engine",),
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="Where the network runs: this machine, or a Ray cluster.",
        ),
        click.option(
            "--ray-address",
            help="Address of the Ray cluster; 'auto' for the one that runs here.  [default: start one on this machine]",
        ),
        click.option(
            "--replicas",
            type=Replicas(),
            default="1",
            show_default=True,
            help="Number of copies of the model on the cluster; a range scales with the load.",
        ),
        click.option(
            "--gpus",
            type=Number(0),
            default=0,
            show_default=True,
            help="GPUs for each copy on the cluster; may be a fraction.",
        ),
        click.option("--cpus", type=Number(0), default=1, show_default=True, help="CPUs for each copy on the cluster."),
    )(command)


def check_local() -> None:
    """Refuse options that only a cluster understands."""
    context = click.get_current_context()
    for name in ("ray_address", "replicas", "gpus", "cpus"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} has no effect on this machine alone; add --executor ray")
