# SPDX-License-Identifier: Apache-2.0
"""Option types and options that several commands share, so that one name means one thing everywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from internimage_deploy.errors import UserError
from internimage_deploy.runtime.backends.registry import REGISTRY

Command = TypeVar("Command", bound=Callable[..., Any])

FilePath = click.Path(path_type=Path)


BACKEND = click.Choice(["auto", *REGISTRY])
"""What --backend takes wherever a model is run."""


_LARGEST_SIDE = 16384  # in pixels: an RGB image of that size takes 0.8 GB


class Size(click.ParamType):
    """Two positive numbers as "AxB"; the words in `words` pass as they are."""

    def __init__(self, form: str, words: tuple[str, ...] = ()) -> None:
        self.name = "|".join((form, *words))
        self._form = form
        self._words = words

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:  # click 8.1 has no ctx
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple) or value in self._words:
            return value
        match = re.fullmatch(r"(\d+)[xX](\d+)", str(value))
        if match is None or 0 in (pair := (int(match[1]), int(match[2]))):
            example = "2048x512" if self._form.startswith("LONG") else "512x1024"
            words = "".join(f" or '{word}'" for word in self._words)
            self.fail(f"got '{value}', expected {self._form} such as {example}{words}", param, ctx)
        if max(pair) > _LARGEST_SIDE:
            self.fail(f"got '{value}', expected at most {_LARGEST_SIDE} pixels on a side", param, ctx)
        return pair


class Number(click.FloatRange):
    """A finite number within bounds; click's own range lets "nan" pass every bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"got '{value}', expected a finite number", param, ctx)
        return number


class Scales(click.ParamType):
    """Factors with commas between them, such as "0.5,1.0,1.5"."""

    name = "S,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(text) for text in str(value).split(","))
        except ValueError:
            self.fail(f"got '{value}', expected factors such as 0.5,0.75,1.0,1.25,1.5,1.75", param, ctx)


def apply_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator from several; --help lists the options in the order given."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class Option(click.Option):
    """An option with names it had in earlier versions: they work, for people's scripts, and --help leaves them out.

    Use it as `click.option("--executor", cls=Option, aliases=("--engine",), ...)`.
    """

    def __init__(self, declarations: Sequence[str], *, aliases: Sequence[str] = (), **settings: Any) -> None:
        named = any(not text.startswith("-") for text in declarations)
        parameter = () if named else (declarations[0].lstrip("-").replace("-", "_"),)
        super().__init__([*declarations, *aliases, *parameter], **settings)
        self.aliases = frozenset(aliases)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        every, self.opts = self.opts, [name for name in self.opts if name not in self.aliases]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = every


def model_argument(command: Command) -> Command:
    """MODEL, a file that `export-onnx` or `build-engine` wrote."""
    return click.argument("model", type=FilePath)(command)


def backend_option(command: Command) -> Command:
    """--backend, and --retime for its default."""
    return apply_options(
        click.option(
            "--backend",
            type=BACKEND,
            default="auto",
            show_default=True,
            help="Backend that runs the network. 'auto' takes what an engine was built for. For an ONNX file it takes "
            "onnxruntime; with the package openvino installed, it times both on the CPU the first time that a model is "
            "used, and takes openvino where that is faster by more than 10 %. It never takes a GPU for an ONNX file.",
        ),
        click.option(
            "--retime",
            is_flag=True,
            expose_value=False,
            callback=_forget_times,
            help="Forget the timings that 'auto' has kept, of every model, and time again.",
        ),
    )(command)


def _forget_times(ctx: click.Context, _option: click.Parameter, chosen: bool) -> None:
    if chosen and not ctx.resilient_parsing:
        from internimage_deploy.runtime.backends.fastest import forget_times

        forget_times()


def threads_option(command: Command) -> Command:
    """--threads."""
    return click.option(
        "--threads",
        type=click.IntRange(1),
        help="Number of CPU threads for the network.  [default: all that this process may use]",
    )(command)


def engine_options(command: Command) -> Command:
    """--trust-engine and --cuda-graphs/--no-cuda-graphs."""
    return apply_options(
        click.option(
            "--trust-engine",
            is_flag=True,
            help="Allow an engine to run the code it carries (an embedded plugin or lean runtime); only for "
            "engines from a source you trust.",
        ),
        click.option(
            "--cuda-graphs/--no-cuda-graphs",
            default=True,
            show_default=True,
            help="Record an engine's kernel launches once and replay them as a CUDA graph.",
        ),
    )(command)


def resize_option(command: Command) -> Command:
    """--resize."""
    return click.option(
        "--resize",
        type=Size("LONGxSHORT", ("own",)),
        help="Size in pixels that images are resized to fit into, keeping their aspect ratio; 'own' keeps each image's "
        "own size.  [default: the size the model was evaluated with]",
    )(command)


def window_options(command: Command) -> Command:
    """--slide, --whole, --crop and --stride; see `window_of`."""
    return apply_options(
        click.option(
            "--slide",
            is_flag=True,
            help="Run the network on overlapping crops of the image and average their logits.  [default: where the "
            "model was evaluated that way]",
        ),
        click.option(
            "--whole",
            is_flag=True,
            help="Run the network on the whole image, also where the model was evaluated with a sliding window.",
        ),
        click.option(
            "--crop",
            type=Size("HxW"),
            help="Height and width of a crop, with --slide.  [default: those the model was evaluated with, or its "
            "fixed size]",
        ),
        click.option(
            "--stride",
            type=Size("HxW"),
            help="Step between crops, with --slide and --crop.  [default: that of the model's evaluation; two thirds "
            "of a crop that is given or of the fixed size]",
        ),
    )(command)


def augmentation_options(command: Command) -> Command:
    """--scales and --flip."""
    return apply_options(
        click.option(
            "--scales",
            type=Scales(),
            default=(),
            help="Test-time augmentation: run the network at each of these factors of the size that images are resized "
            "to, and average the class probabilities, as mmsegmentation's multi-scale test does "
            "(0.5,0.75,1.0,1.25,1.5,1.75).  [default: that size alone]",
        ),
        click.option(
            "--flip",
            is_flag=True,
            help="Test-time augmentation: also run the network on the mirror image, and average.",
        ),
    )(command)


def window_of(slide: bool, whole: bool, crop: tuple[int, int] | None, stride: tuple[int, int] | None) -> Any:
    """The `window` of `LoadOptions` for the values of `window_options`."""
    from internimage_deploy.window import Window, default_stride

    if slide and whole:
        raise click.UsageError("--slide and --whole exclude each other")
    if (crop or stride) and not slide:
        raise click.UsageError("--crop and --stride need --slide")
    if not slide:
        return "whole" if whole else None
    if crop is None:
        if stride is not None:
            raise click.UsageError("--stride needs --crop")
        return "slide"
    try:
        return Window(crop, stride or default_stride(crop))
    except UserError as error:
        raise click.UsageError(str(error)) from error


def batch_option(default: int) -> Callable[[Command], Command]:
    """--batch."""
    return click.option(
        "--batch",
        type=click.IntRange(1, 1024),
        default=default,
        show_default=True,
        help="Maximum number of images in one run of the network; a model of fixed batch size ignores it.",
    )


def max_pixels_option(default: int) -> Callable[[Command], Command]:
    """--max-pixels."""
    return click.option(
        "--max-pixels",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Maximum number of pixels per image; larger images are rejected before they are decoded.",
    )
