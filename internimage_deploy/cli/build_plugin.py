# SPDX-License-Identifier: Apache-2.0
"""`internimage-deploy build-plugin`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Literal

import click

from internimage_deploy.cli.options import Option


def _architectures(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> list[int]:
    """Compute capabilities "8.7", "87" or "sm_87", separated by commas, as the compiler's numbers: 87."""
    numbers = []
    for text in (part.strip() for value in values for part in value.split(",")):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)", text)
        if match is None:
            raise click.BadParameter(f"'{text}' is no compute capability; expected one such as 8.7")
        numbers.append(int(match[1] + match[2]))
    return numbers


_EXAMPLES = """\b
Examples:
  internimage-deploy build-plugin
  internimage-deploy build-plugin --compute-capability 8.7 -o libinternimage_trt_plugins.so
"""


@click.command("build-plugin", epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.so",
    help="Copy the library to this file, and libinternimage_trt_register.so beside it. Either way both are kept in the "
    "user's cache, where build-engine finds them.",
)
@click.option(
    "--compute-capability",
    "architectures",
    cls=Option,
    aliases=("--arch",),
    multiple=True,
    callback=_architectures,
    metavar="8.7,8.9,...",
    help="Compute capabilities of the GPUs to compile for.  [default: every one that the CUDA compiler knows]",
)
@click.option(
    "--tensorrt-include",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of TensorRT's headers (NvInfer.h).  [default: $TENSORRT_ROOT/include, the system's folders, else a "
    "download]",
)
@click.option(
    "--nvcc",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="CUDA compiler.  [default: the first of $CUDACXX, $CUDA_HOME, the PATH, /usr/local/cuda, the PyPI wheels]",
)
@click.option(
    "--interface",
    type=click.Choice(["v2", "v3"]),
    help="Plugin interface of TensorRT.  [default: v3 for TensorRT 10 and later, v2 for older ones]",
)
def build_plugin(
    output: Path | None,
    architectures: list[int],
    tensorrt_include: Path | None,
    nvcc: Path | None,
    interface: Literal["v2", "v3"] | None,
) -> None:
    """Compile the TensorRT plugins of DCNv3, MSDeformAttn and UpsampleArgmax and print the library's path.

    Needs a CUDA compiler and TensorRT's headers, but neither a GPU nor TensorRT itself. A library that was compiled
    before from the same sources, versions and compute capabilities is taken from the cache. A second library beside it,
    libinternimage_trt_register.so, registers the first for programs that only open a library.
    """
    from internimage_deploy.trt_plugins.build import LIBRARY, build, copy_libraries, find_register_library, make_plan
    from internimage_deploy.trt_plugins.library import LIBRARY_VARIABLE
    from internimage_deploy.trt_plugins.toolchain import installed_tensorrt

    plan = make_plan(
        nvcc=nvcc,
        tensorrt_include=tensorrt_include,
        architectures=architectures or None,
        interface=interface,
        # Named headers say which TensorRT is meant; without them it is the one that is installed here.
        tensorrt=None if tensorrt_include else installed_tensorrt(),
    )
    for line in plan.describe():
        click.echo(line, err=True)
    start = time.monotonic()
    library, built = build(plan)
    took = f"compiled in {time.monotonic() - start:.0f} s" if built else "from the cache"
    click.echo(f"library    {took}, {library.stat().st_size / 2**20:.1f} MiB", err=True)
    register = find_register_library(library)
    if output is not None:
        register = copy_libraries(library, output)
        library = output.absolute()
    seeks = "" if library.name == LIBRARY else f"; it looks beside itself for {LIBRARY}, or takes ${LIBRARY_VARIABLE}"
    click.echo(f"register   {register.absolute()}, for programs that only open a library{seeks}", err=True)
    click.echo(str(library))
