# SPDX-License-Identifier: Apache-2.0
"""`build-engine`: an ONNX file to a TensorRT or TensorRT-RTX engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from internimage_deploy.cli.options import FilePath, Size
from internimage_deploy.errors import UserError, escaped
from internimage_deploy.runtime.engine.engine_backend import (
    DISPLAY_NAMES,
    ENGINE_BACKENDS,
    FUSIONS,
    MS_DEFORM_ATTN_PLUGINS,
)
from internimage_deploy.runtime.engine.profiles import InputSize, described, parse_size

if TYPE_CHECKING:
    from internimage_deploy.runtime.engine.build import BuiltEngine


class ProfileSize(click.ParamType):
    """NxHxW: batch size, height and width in pixels."""

    name = "NxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> InputSize:
        if isinstance(value, tuple):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


_EXAMPLES = """\b
Examples:
  build-engine model.onnx -o model.engine --fp16
  build-engine model.onnx -o model.engine --fp16 --backend tensorrt-rtx --compute-capability 8.6,8.9
  build-engine dynamic.onnx -o dynamic.engine --fp16 --min 1x64x64 --opt 1x512x704 --max 4x512x2048
"""


@click.command(name="build-engine", epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=FilePath)
@click.option(
    "-o", "--output", required=True, type=FilePath, help="Engine file to write; its card is written beside it."
)
@click.option("--fp16", is_flag=True, help="Convert the model to float16; statistics and sums stay in float32.")
@click.option("--bf16", is_flag=True, help="Convert the model to bfloat16; statistics and sums stay in float32.")
@click.option(
    "--keep-fp32",
    multiple=True,
    metavar="NAME",
    help="Operator type, node name or node name pattern with * to keep in float32, with --fp16 or --bf16. May be "
    "repeated.",
)
@click.option(
    "--backend",
    type=click.Choice(ENGINE_BACKENDS),
    help="Library that compiles and later runs the engine.  [default: tensorrt where it and a GPU are available, else "
    "tensorrt-rtx]",
)
@click.option(
    "--min",
    type=ProfileSize(),
    multiple=True,
    metavar="NxHxW",
    help="Smallest input of a dynamic model: batch size, height and width. May be repeated, once per profile, like "
    "--opt and --max. Alone, it replaces the smallest input of the default profiles.  [default of all three: from the "
    "window or the resize rule in the model card]",
)
@click.option(
    "--opt",
    type=ProfileSize(),
    multiple=True,
    metavar="NxHxW",
    help="Input of a dynamic model that the engine is tuned for. Alone, it replaces that of the default profiles.  "
    "[default: --max]",
)
@click.option(
    "--max",
    type=ProfileSize(),
    multiple=True,
    metavar="NxHxW",
    help="Largest input of a dynamic model.  [default: --opt]",
)
@click.option(
    "--compute-capability",
    "compute_capabilities",
    metavar="X.Y,...",
    help="Compute capabilities of the GPUs to compile for, with TensorRT-RTX.  [default: 8.0, 8.6, 8.9, 12.0 and "
    "later]",
)
@click.option(
    "--workspace",
    "workspace_mib",
    type=click.IntRange(1),
    metavar="MiB",
    help="Maximum scratch memory of the engine in MiB.  [default: the compiler's own limit]",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="Effort of the compiler: 0 builds quickly, 5 searches longest for fast kernels.  [default: the compiler's "
    "own]",
)
@click.option(
    "--timing-cache",
    type=FilePath,
    help="File that keeps kernel timings, so that later builds are quicker, with TensorRT.  [default: one in the "
    "user's cache folder]",
)
@click.option("--no-timing-cache", is_flag=True, help="Neither read nor keep kernel timings.")
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Make the engine load in newer TensorRT versions, too (of the same major number; 11 from 10; 10 from 8). It "
    "carries the lean runtime, and loading it needs --trust-engine.",
)
@click.option(
    "--tf32",
    is_flag=True,
    help="Let what runs in float32 multiply with TF32's 10 bits of mantissa, on GPUs that can.",
)
@click.option(
    "--fusion",
    type=click.Choice(FUSIONS),
    default="auto",
    show_default=True,
    help="Form of UPerNet's fusion convolutions: rewritten as export-onnx writes them, or plain (upsampling, "
    "concatenation, one convolution). auto builds both, times them on the GPU at hand and keeps the faster; without a "
    "GPU it keeps the rewritten form.",
)
@click.option(
    "--plugin",
    type=FilePath,
    help="Plugin library, with TensorRT.  [default: the one that build-plugin made, compiled if there is none]",
)
@click.option(
    "--embed-plugin/--no-embed-plugin",
    default=False,
    help="Put the plugins into the engine, which makes it version-compatible: it needs the lean runtime, and "
    "loading it needs --trust-engine.  [default: copy the library beside the engine]",
)
@click.option(
    "--pack-offsets/--no-pack-offsets",
    default=True,
    show_default=True,
    help="Let the DCNv3 plugin read offsets and mask from the one tensor that a matrix product computes, with "
    "TensorRT; otherwise two more kernels per layer take it apart.",
)
@click.option(
    "--fuse-argmax/--no-fuse-argmax",
    default=True,
    show_default=True,
    help="Let a plugin upsample the logits and take the argmax in one step, with TensorRT; otherwise the logits of all "
    "classes are written at the size of the labels.",
)
@click.option(
    "--half-interpolation",
    is_flag=True,
    help="Let the DCNv3 plugin choose kernels that interpolate in float16, with TensorRT and --fp16. Sums over "
    "sampling points stay in float32. Compare labels before use, with verify.",
)
@click.option(
    "--ms-deform-attn",
    type=click.Choice(MS_DEFORM_ATTN_PLUGINS),
    default="own",
    show_default=True,
    help="Plugin for multi-scale deformable attention (Mask2Former models), with TensorRT: this project's, or the one "
    "that TensorRT brings, to compare the two. TensorRT's needs --keep-fp32 MSDeformAttn with --fp16.",
)
@click.option("--save-onnx", type=FilePath, help="File to write the converted graph to that the compiler reads.")
@click.option(
    "--whole",
    is_flag=True,
    help="Compile the engine for whole images. A model that was evaluated with a sliding window is otherwise compiled "
    "to return logits for crops.",
)
@click.option(
    "--classes",
    metavar="DATASET|N|FILE",
    help="Classes of a model without a card: a data set's name (an unknown name lists them), a number of classes, or a "
    "text file with one name per line.",
)
@click.option("--size", type=Size("HxW"), help="Input size of a model without a card, where the file leaves it free.")
def build_engine(
    fp16: bool,
    bf16: bool,
    compute_capabilities: str | None,
    no_timing_cache: bool,
    **options: Any,
) -> None:
    """Compile MODEL, an ONNX file, into an engine.

    TensorRT compiles for the GPU of this machine. TensorRT-RTX needs no GPU and compiles for several kinds of them. A
    dynamic model is compiled for one or several ranges of input sizes, called profiles (--min, --opt, --max).
    """
    from internimage_deploy.runtime.engine import build
    from internimage_deploy.runtime.engine.progress import BuildTree

    if fp16 and bf16:
        raise click.UsageError("--fp16 and --bf16 exclude each other")
    if options["timing_cache"] is not None and no_timing_cache:
        raise click.UsageError("--timing-cache and --no-timing-cache exclude each other")
    try:
        build.check_output_name(options["output"])
    except UserError as error:
        raise click.BadParameter(str(error), param_hint="--output") from error
    with BuildTree(options["model"].name) as tree:
        built = build.build_engine(
            precision="fp16" if fp16 else "bf16" if bf16 else "fp32",
            compute_capabilities=compute_capabilities.split(",") if compute_capabilities else (),
            use_timing_cache=not no_timing_cache,
            on_event=tree.show,
            **options,
        )
    _print_summary(built)


def _print_summary(built: BuiltEngine) -> None:
    info = built.card.engine
    assert info is not None
    for warning in built.warnings:
        click.echo(escaped(f"compiler: {warning}", keep="\n\t"), err=True)
    for note in built.notes:
        click.echo(escaped(f"note: {note}"), err=True)
    gpus = f" for compute capability {', '.join(info.compute_capabilities)}" if info.compute_capabilities else ""
    click.echo(
        f"wrote {built.path} ({built.size_bytes / 1e6:.1f} MB, {built.card.precision}) with "
        f"{DISPLAY_NAMES[info.backend]} {info.version}{gpus} in {built.seconds:.0f} s"
    )
    for profile in info.profiles:
        click.echo(f"profile: {described(profile)}")
