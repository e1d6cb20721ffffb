# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, so that one name means one thing everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from internimage_deploy.runtime.backends.registry import REGISTRY

Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType):
    """Two positive numbers as "AxB"; the words in `words` pass as they are."""

    def __init__(self, form: str, words: tuple[str, ...] = ()) -> None:
        self.name = "|".join((form, *words))
        self._form = form
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple) or value in self._words:
            return value
        match = re.fullmatch(r"(\d+)[xX](\d+)", str(value))
        if match is None or 0 in (pair := (int(match[1]), int(match[2]))):
            words = "".join(f" or '{word}'" for word in self._words)
            self.fail(f"got '{value}', expected {self._form} such as 512x1024{words}", param, ctx)
        return pair


def model_argument(command: Command) -> Command:
    """MODEL, a file that `export-onnx` or `build-engine` wrote."""
    return click.argument("model", type=click.Path(path_type=Path))(command)


def backend_option(command: Command) -> Command:
    """--backend."""
    return click.option(
        "--backend",
        type=click.Choice(["auto", *REGISTRY]),
        default="auto",
        show_default=True,
        help="What runs the network; auto takes the fastest CPU backend that is installed, for an engine its own.",
    )(command)


def threads_option(command: Command) -> Command:
    """--threads."""
    return click.option(
        "--threads", type=click.IntRange(1), help="CPU threads of the network.  [default: all that are available]"
    )(command)


def engine_options(command: Command) -> Command:
    """--trust-engine and --no-cuda-graphs."""
    command = click.option(
        "--cuda-graphs/--no-cuda-graphs", default=True, help="Engines: record launches and replay them.  [default: on]"
    )(command)
    return click.option(
        "--trust-engine", is_flag=True, help="Let an engine run the code it carries; only for engines you trust."
    )(command)
