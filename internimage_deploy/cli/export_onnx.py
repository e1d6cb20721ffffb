# SPDX-License-Identifier: Apache-2.0
"""The command `export-onnx`."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from internimage_deploy.cli.options import Number, Size
from internimage_deploy.errors import UserError
from internimage_deploy.exporter import require_packages
from internimage_deploy.exporter.options import (
    ACTIVATIONS,
    DEFAULT_OPSET,
    DEFAULT_TOLERANCE,
    OPSETS,
    SIZE_DIVISOR,
    Activation,
    Emit,
    Input,
)

if TYPE_CHECKING:
    from internimage_deploy.exporter.export import ExportedModel, Progress


class NetworkSize(Size):
    """HxW in pixels, both multiples of 32."""

    def __init__(self) -> None:
        super().__init__("HxW")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        size = super().convert(value, param, ctx)
        for side in size:
            if side % SIZE_DIVISOR:
                below = max(side // SIZE_DIVISOR * SIZE_DIVISOR, SIZE_DIVISOR)
                self.fail(
                    f"'{value}': {side} is no multiple of {SIZE_DIVISOR}; the nearest are {below} and "
                    f"{(side // SIZE_DIVISOR + 1) * SIZE_DIVISOR}",
                    param,
                    ctx,
                )
        return size


class Integers(click.ParamType):
    """Integers separated by commas."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if re.fullmatch(r"\d+(,\d+)*", value) is None:
            self.fail(f"'{value}': expected integers separated by commas, for example 5,11,17", param, ctx)
        return tuple(int(part) for part in value.split(","))


@click.command(name="export-onnx", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--ckpt", type=click.Path(path_type=Path), help="Checkpoint of a segmentation model (.pth or .safetensors)."
)
@click.option(
    "--random",
    metavar="NAME",
    help="Export the released model NAME with random weights instead of a checkpoint, for tests and timing.",
)
@click.option("--list", "list_presets", is_flag=True, help="List the names of the released models and exit.")
@click.option("--list-rewrites", is_flag=True, help="List the algebraic rewrites and exit.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="ONNX file to write.")
@click.option(
    "--size",
    type=NetworkSize(),
    help="Fixed height and width of the network's input in pixels, multiples of 32.  [default: free]",
)
@click.option(
    "--dynamic",
    is_flag=True,
    help="Leave height and width free, so that the file takes every multiple of 32. The default without --size.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    help="Fixed number of images per run.  [default: 1 with --size, free without]",
)
@click.option(
    "--input",
    type=click.Choice(("uint8", "float")),
    default="uint8",
    show_default=True,
    help="Form of the network's input. uint8: image (N,H,W,3), RGB, normalised inside the graph; float: input "
    "(N,3,H,W), already normalised.",
)
@click.option(
    "--emit",
    type=click.Choice(("labels", "logits")),
    default="labels",
    show_default=True,
    help="Output of the network. labels: class ids (N,H,W) at network size; logits: (N,classes,H/4,W/4), for class "
    "probabilities and for labels computed at the image's own size; of a Mask2Former, its semantic scores.",
)
@click.option(
    "--arch",
    metavar="NAME",
    help="Released model that the checkpoint belongs to. Needed only where the checkpoint lacks its training config "
    "and its weights alone do not show the architecture.",
)
@click.option(
    "--offset-scale",
    type=Number(0, min_open=True),
    help="Offset scale of DCNv3: 2.0 for InternImage-L and XL, 1.0 for the other released models.  [default: from the "
    "checkpoint]",
)
@click.option(
    "--post-norm-blocks",
    type=Integers(),
    help="Indices of the blocks of level 2 that a post-norm follows, for models like InternImage-H.  [default: from "
    "the checkpoint]",
)
@click.option(
    "--activation", type=click.Choice(ACTIVATIONS), help="Activation function.  [default: from the checkpoint]"
)
@click.option(
    "--attention-heads",
    type=click.IntRange(min=1),
    help="Number of attention heads of a Mask2Former.  [default: from the checkpoint, else one for 32 channels]",
)
@click.option(
    "--norm-groups",
    type=click.IntRange(min=1),
    help="Number of groups of a Mask2Former's group norms.  [default: from the checkpoint, else 32]",
)
@click.option(
    "--ema", is_flag=True, help="Export the exponential moving average of the weights where the checkpoint holds both."
)
@click.option(
    "--classes",
    metavar="FILE|DATASET",
    help="Class names: a text file with one name per line in the order of the ids, or a data set's name (an unknown "
    "name lists them).  [default: from the checkpoint]",
)
@click.option(
    "--palette",
    metavar="FILE|DATASET",
    help="Colours of the classes: a text file with a line 'red green blue' per class, a JSON list of such triples, or "
    "a data set's name.  [default: from the checkpoint]",
)
@click.option(
    "--resize",
    type=Size("LONGxSHORT", ("own",)),
    help="Size in pixels that the runtime resizes images to fit into, keeping their aspect ratio; 'own' keeps each "
    "image's own size.  [default: the size the checkpoint was evaluated with]",
)
@click.option(
    "--plain",
    is_flag=True,
    help="Export the network without algebraic rewrites, to measure what they gain; results are the same either way.",
)
@click.option(
    "--without",
    multiple=True,
    metavar="REWRITE",
    help="Leave out one algebraic rewrite; may be repeated. --list-rewrites shows their names.",
)
@click.option(
    "--opset",
    type=click.Choice([str(opset) for opset in OPSETS]),
    default=str(DEFAULT_OPSET),
    show_default=True,
    help="Version of the standard ONNX operators; 16 is for TensorRT 8.5.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare the file with PyTorch on random input before it is kept.",
)
@click.option(
    "--tolerance",
    type=Number(min=0, min_open=True),
    default=DEFAULT_TOLERANCE,
    show_default=True,
    help="Maximum difference between the logits of the file and of PyTorch, as a fraction of the largest logit.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the random weights and of the random input of the comparison.",
)
@click.option(
    "--verbose", is_flag=True, help="Name the objects in the checkpoint that were neither rebuilt nor run, too."
)
def export_onnx(
    ckpt: Path | None,
    random: str | None,
    list_presets: bool,
    list_rewrites: bool,
    output: Path | None,
    size: tuple[int, int] | None,
    dynamic: bool,
    batch: int | None,
    input: Input,
    emit: Emit,
    arch: str | None,
    offset_scale: float | None,
    post_norm_blocks: tuple[int, ...] | None,
    activation: Activation | None,
    attention_heads: int | None,
    norm_groups: int | None,
    ema: bool,
    classes: str | None,
    palette: str | None,
    resize: tuple[int, int] | Literal["own"] | None,
    plain: bool,
    without: tuple[str, ...],
    opset: str,
    verify: bool,
    tolerance: float,
    seed: int,
    verbose: bool,
) -> None:
    """Export a checkpoint to one portable ONNX file that carries everything the other commands need to know.

    Without --size the file takes every height and width that are multiples of 32.

    \b
    Examples:
      export-onnx --ckpt upernet_internimage_t_512_160k_ade20k.pth -o model.onnx
      export-onnx --ckpt model.pth --size 512x1024 --emit logits -o model.onnx
    """
    require_packages()
    from internimage_deploy.exporter.export import check_paths, export
    from internimage_deploy.exporter.presets import PRESETS
    from internimage_deploy.exporter.rewrites import REWRITES

    if list_presets:
        click.echo("\n".join(PRESETS))
        return
    if list_rewrites:
        width = max(map(len, REWRITES))
        click.echo("\n".join(f"{name:{width}}  {rewrite.summary}" for name, rewrite in REWRITES.items()))
        return
    if (ckpt is None) == (random is None):
        raise click.UsageError("give one of --ckpt FILE.pth and --random NAME")
    if output is None:
        raise click.UsageError("name the file to write with -o MODEL.onnx")
    try:
        check_paths(ckpt, output)
    except UserError as error:
        raise click.UsageError(f"-o {error}") from error
    if size is not None and dynamic:
        raise click.UsageError("--size and --dynamic exclude each other")
    _require_known("--random", random, PRESETS, "--list")
    _require_known("--arch", arch, PRESETS, "--list")
    for name in without:
        _require_known("--without", name, REWRITES, "--list-rewrites")
    logging.getLogger("internimage_deploy.exporter").setLevel(logging.DEBUG if verbose else logging.NOTSET)
    exported = export(
        ckpt,
        output,
        random=random,
        size=size,
        batch=batch,
        input=input,
        emit=emit,
        arch=arch,
        offset_scale=offset_scale,
        post_norm_blocks=post_norm_blocks,
        activation=activation,
        attention_heads=attention_heads,
        norm_groups=norm_groups,
        ema=ema,
        classes=classes,
        palette=palette,
        resize=resize,
        plain=plain,
        without=without,
        opset=int(opset),
        verify=verify,
        tolerance=tolerance,
        seed=seed,
        progress=_terminal_progress(),
    )
    _print_summary(exported)


def _require_known(option: str, name: str | None, known: Collection[str], listing: str) -> None:
    if name is not None and name not in known:
        raise click.BadParameter(
            f"'{name}' does not exist; export-onnx {listing} shows the names", param_hint=f"'{option}'"
        )


def _terminal_progress() -> Progress:
    """Shows each step on standard error: a spinner while it runs (on a terminal), then its name and seconds."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)

    @contextmanager
    def progress(step: str) -> Iterator[None]:
        start = time.monotonic()
        with console.status(step):
            yield
        console.print(f"{step:<12}[dim]{time.monotonic() - start:6.1f} s[/dim]", soft_wrap=True)

    return progress


def _print_summary(exported: ExportedModel) -> None:
    card = exported.card
    for c in exported.report.comparisons if exported.report else ():
        batch, height, width = c.shape
        click.echo(
            f"{batch} x {height}x{width}: max error {c.error:.1e} (logits up to {c.largest:.1f}), "
            f"labels equal {100 * c.agreement:.3f} %, PyTorch {c.torch_seconds:.2f} s, "
            f"ONNX Runtime {c.onnx_seconds:.2f} s"
        )
    input_text, output_text = (
        f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in (card.input, card.output)
    )
    files = [path for path in (exported.path, exported.external_data) if path is not None]
    sizes = ", ".join(f"{path} ({path.stat().st_size / 1e6:.1f} MB)" for path in files)
    rewrites = f"; rewrites: {', '.join(card.rewrites)}" if card.rewrites else ""
    click.echo(f"wrote {sizes}: {card.architecture}, {input_text} -> {output_text}{rewrites}")
