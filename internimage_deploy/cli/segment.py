# SPDX-License-Identifier: Apache-2.0
"""`segment`: images, folders and videos to label maps, overlays and class fractions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import click
from click.core import ParameterSource

from internimage_deploy.cli.cluster_options import check_local, cluster_options
from internimage_deploy.cli.load_options import load_options
from internimage_deploy.cli.options import Number, apply_options, model_argument
from internimage_deploy.runtime.imaging.results import Mask, ResultOptions
from internimage_deploy.runtime.options import LoadOptions

_COMMAND_LINE = ParameterSource.COMMANDLINE

_result_options = apply_options(
    click.option("-o", "--output", required=True, help="Folder for the results, or an object store's prefix."),
    click.option(
        "--mask",
        type=click.Choice(["indexed", "ids", "color"]),
        default="indexed",
        show_default=True,
        help="Format of the label map: a palette PNG of ids that viewers show in colours (OpenCV's imread reads its "
        "colours, Pillow its ids); a grey PNG of ids; or an RGB PNG of colours.",
    ),
    click.option("--overlay", is_flag=True, help="Also write STEM.overlay.png, the image with its labels over it."),
    click.option(
        "--alpha",
        type=Number(0, 1),
        default=0.5,
        show_default=True,
        help="Weight of the labels' colours in the overlay.",
    ),
    click.option(
        "--legend", is_flag=True, help="List the classes that occur beside the overlay of an image; a video gets none."
    ),
    click.option(
        "--overlay-format",
        type=click.Choice(["png", "jpeg"]),
        default="png",
        show_default=True,
        help="File format of the overlay.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Also write STEM.json: classes with pixels and fractions."),
    click.option(
        "--classes",
        metavar="NAME,...",
        help="Classes that the overlay and the JSON file show, by name or id.  [default: all]",
    ),
    click.option("--quiet", is_flag=True, help="Print nothing but what failed."),
)
_input_options = apply_options(
    click.option("--recursive", is_flag=True, help="Search folders to any depth; results keep the subfolders."),
    click.option(
        "--skip-existing",
        is_flag=True,
        help="Leave out images of which the output already holds every file that is asked for.",
    ),
    click.option("--live", is_flag=True, help="Videos: drop frames rather than fall behind."),
    click.option("--frames", type=click.IntRange(1), help="Videos: number of frames after which a video ends."),
    click.option(
        "--frame-masks",
        is_flag=True,
        help="Videos: also write each frame's label map into the folder STEM.frames.",
    ),
)


@click.command()
@model_argument
@click.argument("inputs", metavar="IMAGE|FOLDER|VIDEO...", nargs=-1, required=True)
@_result_options
@_input_options
@load_options
@cluster_options
def segment(
    model: Path,
    inputs: tuple[str, ...],
    output: str,
    mask: Mask,
    overlay: bool,
    alpha: float,
    legend: bool,
    overlay_format: Literal["png", "jpeg"],
    as_json: bool,
    classes: str | None,
    quiet: bool,
    recursive: bool,
    skip_existing: bool,
    live: bool,
    frames: int | None,
    frame_masks: bool,
    options: LoadOptions,
    executor: str,
    ray_address: str | None,
    replicas: tuple[int, int],
    gpus: float,
    cpus: float,
) -> None:
    """Segment images and videos: files, folders, patterns in quotes, web addresses, lists.

    Writes STEM.labels.png into the output folder: class ids at the image's own size, 8-bit (16-bit above 256 classes).
    Inputs may also be "-" for an image from the standard input, a text file with a name in each line, or an object
    store's prefix (s3://, gs://). Images that cannot be read or segmented are named at the end and listed in
    failures.jsonl beside the results; the others are done, and the exit code is 1.

    A video is a file, a camera's number, an address (rtsp://...) or a GStreamer pipeline. For it, --overlay writes
    STEM.overlay.mp4, --json a line for each frame into STEM.frames.jsonl, and --frame-masks the label maps.

    With --executor ray, the images are spread over a Ray cluster, whose machines must all be able to read the model and
    the images and to write the results.

    \b
    Examples:
      internimage-deploy segment model.onnx street.jpg -o out --overlay --legend
      internimage-deploy segment model.engine images/ -o out --json --classes road,car
      internimage-deploy segment model.onnx drive.mp4 -o out --overlay
    """
    from internimage_deploy.cli.segment_run import Run, VideoOptions
    from internimage_deploy.runtime.cluster.connect import Cluster
    from internimage_deploy.runtime.pipelines.find import STDIN, find_inputs
    from internimage_deploy.runtime.pipelines.storage import Location

    if executor == "local":
        check_local()
    found = find_inputs(inputs, recursive=recursive, streams=live or bool(frames))
    if (live or frames or frame_masks) and not found.videos:
        raise click.UsageError("--live, --frames and --frame-masks are for videos")
    if executor == "ray" and found.videos:
        raise click.UsageError(f"{found.videos[0]}: videos are segmented on one machine; leave --executor out")
    if executor == "ray" and any(image.path == STDIN for image in found.images):
        raise click.UsageError("- is read on this machine; leave --executor out")
    if found.videos and not (overlay or as_json or frame_masks):
        what = "nothing would be written for a video; add --overlay, --json or --frame-masks"
        if named := [video for video in found.videos if not video.found]:
            raise click.UsageError(f"{named[0]}: {what}")
        click.echo(f"note: {len(found.videos)} videos in folders are left out: {what}", err=True)
        found.videos.clear()
    if not overlay and (legend or click.get_current_context().get_parameter_source("alpha") is _COMMAND_LINE):
        raise click.UsageError("--alpha and --legend need --overlay")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks about odd metadata: the pixels decide
    results = ResultOptions(overlay, as_json, mask, alpha, legend, overlay_format)
    names = tuple(name.strip() for name in (classes or "").split(",") if name.strip())
    run = Run(model, options, found, Location(output), results, names, skip_existing=skip_existing, quiet=quiet)
    if executor == "ray":
        run.on_cluster(Cluster(ray_address, replicas, gpus, cpus))
    else:
        run.here(VideoOptions(live, frames, frame_masks))
    run.finish()
