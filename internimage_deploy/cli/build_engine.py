# SPDX-License-Identifier: Apache-2.0
"""`build-engine`: an ONNX file to a TensorRT or TensorRT-RTX engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from internimage_deploy.cli.options import Size
from internimage_deploy.errors import UserError
from internimage_deploy.runtime.engine.profiles import described, parse_size

if TYPE_CHECKING:
    from internimage_deploy.runtime.engine.build import Built
    from internimage_deploy.runtime.engine.compilers import Compiler
    from internimage_deploy.runtime.engine.operators import Flavour


class ProfileSize(click.ParamType):
    """NxHxW in pictures and pixels."""

    name = "NxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


_SIZE = ProfileSize()
_PATH = click.Path(path_type=Path)


@click.command(name="build-engine", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=_PATH)
@click.option("-o", "--output", required=True, type=_PATH, help="The engine file to write; its card lies beside it.")
@click.option("--fp16", "precision", flag_value="fp16", help="Convert to float16; statistics stay in float32.")
@click.option("--bf16", "precision", flag_value="bf16", help="Convert to bfloat16; statistics stay in float32.")
@click.option("--keep-fp32", multiple=True, metavar="NAME", help="Operator, node or pattern to leave in float32.")
@click.option(
    "--backend",
    type=click.Choice(("tensorrt", "tensorrt-rtx")),
    help="The compiler.  [default: TensorRT where it and a GPU are there, else TensorRT-RTX]",
)
@click.option("--min", "least", type=_SIZE, multiple=True, help="Smallest input of a dynamic model, once a profile.")
@click.option("--opt", "usual", type=_SIZE, multiple=True, help="Usual input, which the engine is tuned for.")
@click.option("--max", "most", type=_SIZE, multiple=True, help="Largest input.  [default of all three: from the card]")
@click.option(
    "--compute-capability",
    "targets",
    metavar="X.Y,...",
    help="GPUs to compile for (TensorRT-RTX).  [default: 8.0, 8.6, 8.9, 12.0 and later]",
)
@click.option("--workspace", type=click.IntRange(1), metavar="MB", help="Scratch memory limit in MiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="0 builds quickly, 5 searches longest.")
@click.option("--timing-cache", type=_PATH, help="Measured kernels (TensorRT).  [default: in the user's cache folder]")
@click.option("--no-timing-cache", is_flag=True, help="Measure every kernel afresh.")
@click.option("--version-compatible", is_flag=True, help="Loads in newer TensorRT versions of the same major number.")
@click.option("--strip-weights", is_flag=True, help="Leave out weights that can be refitted.")
@click.option("--plugin", "library", type=_PATH, help="The plugin library (TensorRT).  [default: found, else built]")
@click.option("--no-embed-plugin", is_flag=True, help="Keep the plugin in a file of its own (TensorRT).")
@click.option("--save-onnx", type=_PATH, help="Also write the graph that was handed to the compiler.")
@click.option("--classes", help="For a file without a card: a data set such as ade20k, or a file with a name a line.")
@click.option("--size", type=Size("HxW"), help="For a file without a card: fix its input size.")
def build_engine(
    model: Path,
    output: Path,
    precision: Literal["fp16", "bf16"] | None,
    keep_fp32: tuple[str, ...],
    backend: Flavour | None,
    least: tuple[tuple[int, int, int], ...],
    usual: tuple[tuple[int, int, int], ...],
    most: tuple[tuple[int, int, int], ...],
    targets: str | None,
    workspace: int | None,
    optimization_level: int | None,
    timing_cache: Path | None,
    no_timing_cache: bool,
    version_compatible: bool,
    strip_weights: bool,
    library: Path | None,
    no_embed_plugin: bool,
    save_onnx: Path | None,
    classes: str | None,
    size: tuple[int, int] | None,
) -> None:
    """Compile MODEL, an ONNX file, into an engine.

    With TensorRT-RTX no GPU is needed; with TensorRT the engine is for the GPU that builds it. A dynamic model is built
    for one or several ranges of sizes (--min, --opt, --max).
    """
    from internimage_deploy.runtime.engine import compilers
    from internimage_deploy.runtime.engine import targets as rtx_targets
    from internimage_deploy.runtime.engine.build import Options, build
    from internimage_deploy.runtime.engine.progress import BuildTree

    if timing_cache is not None and no_timing_cache:
        raise click.UsageError("--timing-cache and --no-timing-cache exclude each other")
    if output.suffix.lower() == ".onnx":
        raise click.BadParameter(f"{output} is named like an ONNX file; expected a name such as model.engine")
    wanted = rtx_targets.parse(targets) if targets else ()
    compiler = compilers.choose(backend)
    names, palette = _classes(classes) if classes else (None, None)
    if timing_cache is None and compiler.flavour == "tensorrt" and not no_timing_cache:
        timing_cache = default_timing_cache(compiler.version)
    options = Options(
        precision=precision or "fp32",
        keep_fp32=keep_fp32,
        least=least,
        usual=usual,
        most=most,
        workspace_mib=workspace,
        optimization_level=optimization_level,
        compute_capabilities=wanted,
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        strip_weights=strip_weights,
        embed_plugin=not no_embed_plugin,
        classes=names,
        palette=palette,
        size=size,
    )
    with BuildTree(f"{_called(compiler)}: {model.name}") as tree:
        built = build(
            model,
            output,
            compiler,
            options,
            follow=tree.follow,
            save_onnx=save_onnx,
            plugin=_plugin_finder(compiler, library),
        )
    for warning in tree.warnings:
        click.echo(f"compiler: {warning}", err=True)
    _tell(built, compiler)


def default_timing_cache(version: str) -> Path:
    """Where measured kernels are kept for this version of TensorRT."""
    from internimage_deploy.cache import cache_folder

    return cache_folder() / "timing" / f"tensorrt-{version}.cache"


def _called(compiler: Compiler) -> str:
    return f"{'TensorRT-RTX' if compiler.flavour == 'tensorrt-rtx' else 'TensorRT'} {compiler.version}"


def _classes(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Names and colours from a data set's name, a number of classes, or a file with a name a line."""
    from internimage_deploy.datasets import classes as tables

    path = Path(text)
    if path.is_file():
        names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
        if not names:
            raise UserError(f"--classes {text}: the file holds no names, expected one a line")
        known = tables.lookup(len(names))
        palette = known[1] if known is not None and known[0] == names else tables.generic(len(names))[1]
        return names, palette
    found = tables.lookup(int(text) if text.isdigit() else text)
    if found is None:
        raise UserError(
            f"--classes {text}: neither a data set nor a file; expected one of {', '.join(tables.DATASETS)}, "
            "or a text file with a name a line"
        )
    return found


def _plugin_finder(compiler: Compiler, library: Path | None) -> Any:
    def find() -> tuple[Path, str]:
        from internimage_deploy.runtime.engine.plugin import ensure

        return ensure(compiler, library)

    return find


def _tell(built: Built, compiler: Compiler) -> None:
    info = built.card.engine
    assert info is not None
    for note in built.notes:
        click.echo(f"note: {note}", err=True)
    size = f"{built.size_bytes / 1e6:.1f} MB"
    where = f" for compute capability {', '.join(info.compute_capabilities)}" if info.compute_capabilities else ""
    click.echo(
        f"wrote {built.path} ({size}, {built.card.precision}) with {_called(compiler)}{where} in {built.seconds:.0f} s"
    )
    for profile in info.profiles:
        click.echo(f"profile: {described(profile)}")
