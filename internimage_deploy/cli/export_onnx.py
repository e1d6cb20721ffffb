# SPDX-License-Identifier: Apache-2.0
"""The command `export-onnx`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from internimage_deploy.cli.options import Size
from internimage_deploy.errors import MissingDependency
from internimage_deploy.exporter.options import DEFAULT_OPSET, OPSETS, SIZE_DIVISOR, ExportOptions

if TYPE_CHECKING:
    from internimage_deploy.exporter.export import Exported, ModelFacts
    from internimage_deploy.exporter.models import Segmentor

_ACTIVATIONS = ("GELU", "GELU_tanh", "ReLU", "SiLU")


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
@click.option("--ckpt", type=click.Path(path_type=Path), help="Official segmentation checkpoint (.pth).")
@click.option("--random", "preset", metavar="NAME", help="Random weights for the released model NAME.")
@click.option("--list", "list_presets", is_flag=True, help="List the released models and exit.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The ONNX file to write.")
@click.option("--size", type=NetworkSize(), help="Fixed network size, multiples of 32.")
@click.option("--dynamic", is_flag=True, help="Free height and width (multiples of 32). The default without --size.")
@click.option("--batch", type=click.IntRange(1, 1024), help="Fixed batch. Default: 1 with --size, free with --dynamic.")
@click.option(
    "--input",
    "takes",
    type=click.Choice(("uint8", "float")),
    default="uint8",
    show_default=True,
    help="uint8: image (N,H,W,3) RGB, normalised in the graph; float: input (N,3,H,W), normalised.",
)
@click.option(
    "--emit",
    type=click.Choice(("labels", "logits")),
    default="labels",
    show_default=True,
    help="labels: (N,H,W) at network size; logits: (N,classes,H/4,W/4).",
)
@click.option("--arch", metavar="NAME", help="The released model that the checkpoint is of, where it does not tell.")
@click.option("--offset-scale", type=float, help="DCNv3's offset scale, where the checkpoint does not tell.")
@click.option("--post-norm-blocks", type=Integers(), help="Level-2 blocks with a post-norm, where it does not tell.")
@click.option("--activation", type=click.Choice(_ACTIVATIONS), help="The activation, where it does not tell.")
@click.option("--ema", is_flag=True, help="Take the averaged weights where the checkpoint holds both.")
@click.option("--plain", is_flag=True, help="Switch every algebraic rewrite off.")
@click.option("--without", multiple=True, metavar="REWRITE", help="Switch one rewrite off; may be repeated.")
@click.option("--opset", type=click.Choice([str(o) for o in OPSETS]), default=str(DEFAULT_OPSET), show_default=True)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with PyTorch on random input.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=1e-4,
    show_default=True,
    help="Largest |ONNX - PyTorch| / max(1, largest |logit|) that the comparison lets pass.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and of the comparison's input.")
def export_onnx(
    ckpt: Path | None,
    preset: str | None,
    list_presets: bool,
    output: Path | None,
    size: tuple[int, int] | None,
    dynamic: bool,
    batch: int | None,
    takes: Literal["uint8", "float"],
    emit: Literal["labels", "logits"],
    arch: str | None,
    offset_scale: float | None,
    post_norm_blocks: tuple[int, ...] | None,
    activation: str | None,
    ema: bool,
    plain: bool,
    without: tuple[str, ...],
    opset: str,
    verify: bool,
    tolerance: float,
    seed: int,
) -> None:
    """Write a checkpoint as one portable ONNX file that carries all the runtime needs to know.

    Without --size the file takes every height and width that are multiples of 32.
    """
    _need_torch()
    from internimage_deploy.exporter.presets import PRESETS
    from internimage_deploy.exporter.rewrites import REWRITES, select

    if list_presets:
        click.echo("\n".join(PRESETS))
        return
    if (ckpt is None) == (preset is None):
        raise click.UsageError("give one of --ckpt FILE.pth and --random NAME")
    if output is None:
        raise click.UsageError("name the file to write with -o MODEL.onnx")
    if output.suffix.lower() != ".onnx":
        raise click.UsageError(f"-o {output}: the commands that read it know it by its ending; name it {output}.onnx")
    if ckpt is not None and ckpt.exists() and output.exists() and output.samefile(ckpt):
        raise click.UsageError(f"-o {output} is the checkpoint itself; name another file")
    if size is not None and dynamic:
        raise click.UsageError("--size and --dynamic exclude each other")
    _expect_known("--random", preset, PRESETS, "export-onnx --list names the released models")
    _expect_known("--arch", arch, PRESETS, "export-onnx --list names the released models")
    for name in without:
        _expect_known("--without", name, REWRITES, f"expected one of {', '.join(REWRITES)}")
    options = ExportOptions(
        size=size,
        batch=1 if batch is None and size is not None else batch,
        input=takes,
        emit=emit,
        plain=plain,
        without=without,
        opset=int(opset),
    )
    select(options)  # tells of rewrites that cannot be left out before any work is done

    from internimage_deploy.exporter.export import export
    from internimage_deploy.exporter.progress import on_terminal
    from internimage_deploy.exporter.verify import Check

    step = on_terminal()
    with step("loading"):
        if ckpt is not None:
            hints = {"arch": arch, "offset_scale": offset_scale, "post_norm_blocks": post_norm_blocks}
            segmentor, facts, notes = _from_checkpoint(ckpt, act_layer=activation, ema=ema, **hints)
        else:
            assert preset is not None
            segmentor, facts, notes = _from_preset(preset, seed)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    check = Check(tolerance, seed) if verify else None
    _tell(export(segmentor, options, facts, output, check=check, step=step))


def _need_torch() -> None:
    """Raise `MissingDependency` for what the exporter needs and a runtime-only installation lacks."""
    from importlib.util import find_spec

    for package in ("torch", "onnxscript"):
        if find_spec(package) is None:
            raise MissingDependency(package, "export", "exporting a checkpoint")


def _expect_known(option: str, name: str | None, known: Any, remedy: str) -> None:
    if name is not None and name not in known:
        raise click.BadParameter(f"'{name}' does not exist; {remedy}", param_hint=f"'{option}'")


def _from_checkpoint(path: Path, **hints: Any) -> tuple[Segmentor, ModelFacts, tuple[str, ...]]:
    from internimage_deploy.exporter.checkpoint import read_checkpoint
    from internimage_deploy.exporter.export import ModelFacts
    from internimage_deploy.exporter.models import build_with

    checkpoint = read_checkpoint(path, **hints)
    facts = ModelFacts(
        checkpoint.architecture, checkpoint.classes, checkpoint.palette, checkpoint.resize, checkpoint.source
    )
    return build_with(checkpoint.config, checkpoint.state_dict), facts, checkpoint.report


def _from_preset(name: str, seed: int) -> tuple[Segmentor, ModelFacts, tuple[str, ...]]:
    from internimage_deploy.datasets import classes
    from internimage_deploy.exporter.export import ModelFacts
    from internimage_deploy.exporter.models import build_random
    from internimage_deploy.exporter.presets import PRESETS

    preset = PRESETS[name]
    table = classes.lookup(preset.dataset) or ((), ())
    names, palette = classes.fitted(*table, preset.config.head.num_classes)
    facts = ModelFacts(name, names, palette, preset.resize, {"random": str(seed)})
    return build_random(preset.config, seed), facts, ("random weights: the labels mean nothing",)


def _tell(exported: Exported) -> None:
    card = exported.card
    for c in exported.report.comparisons if exported.report else ():
        batch, height, width = c.shape
        click.echo(
            f"{batch} x {height}x{width}: max error {c.error:.1e} (logits up to {c.largest:.1f}), "
            f"labels equal {100 * c.agreement:.3f} %, PyTorch {c.torch_seconds:.2f} s, "
            f"ONNX Runtime {c.onnx_seconds:.2f} s"
        )
    takes, gives = (
        f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in (card.input, card.output)
    )
    files = [path for path in (exported.path, exported.external_data) if path is not None]
    sizes = ", ".join(f"{path} ({path.stat().st_size / 1e6:.1f} MB)" for path in files)
    rewrites = f"; rewrites: {', '.join(card.rewrites)}" if card.rewrites else ""
    click.echo(f"wrote {sizes}: {card.architecture}, {takes} -> {gives}{rewrites}")
