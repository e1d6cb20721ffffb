# SPDX-License-Identifier: Apache-2.0
"""`segment`: pictures and folders to labels, overlays and class shares."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from internimage_deploy.cli.cluster_options import (
    PathOrAddress,
    check_local,
    cluster_options,
    segment_on_cluster,
)
from internimage_deploy.cli.options import (
    Size,
    backend_option,
    engine_options,
    model_argument,
    threads_option,
)
from internimage_deploy.errors import UserError
from internimage_deploy.files import atomic_write, write_error
from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS


@click.command()
@model_argument
@click.argument(
    "inputs", metavar="PICTURE|FOLDER|VIDEO...", nargs=-1, required=True, type=PathOrAddress(path_type=Path)
)
@click.option("-o", "--output", required=True, type=PathOrAddress(path_type=Path), help="Folder for the results.")
@click.option("--overlay", is_flag=True, help="Also write STEM.overlay.png, the picture with its labels over it.")
@click.option("--json", "as_json", is_flag=True, help="Also write STEM.json: class, pixels, share.")
@click.option(
    "--resize",
    type=Size("LONGxSHORT", ("own",)),
    help="Fit pictures into this size before the network, keeping their ratio; 'own' for no resizing."
    "  [default: what the model was trained for]",
)
@click.option("--recursive", is_flag=True, help="Search folders to any depth; results keep the subfolders.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Most pictures in one run.")
@click.option("--slide", is_flag=True, help="Sliding window instead of the whole picture at once (logits models).")
@click.option("--crop", type=Size("HxW"), help="With --slide: the window.  [default: the model's fixed size]")
@click.option("--stride", type=Size("HxW"), help="With --slide: its step.  [default: two thirds of the window]")
@click.option("--max-pixels", type=click.IntRange(1), default=MAX_PIXELS, show_default=True, help="Refuse larger ones.")
@click.option("--live", is_flag=True, help="Videos: drop frames rather than fall behind.")
@click.option("--frames", type=click.IntRange(1), help="Videos: stop after so many frames.")
@backend_option
@engine_options
@threads_option
@cluster_options
def segment(
    model: Path,
    inputs: tuple[Path, ...],
    output: Path,
    overlay: bool,
    as_json: bool,
    resize: Any,
    recursive: bool,
    batch: int,
    slide: bool,
    crop: tuple[int, int] | None,
    stride: tuple[int, int] | None,
    max_pixels: int,
    live: bool,
    frames: int | None,
    backend: str,
    trust_engine: bool,
    cuda_graphs: bool,
    threads: int | None,
    engine: str,
    **cluster: Any,
) -> None:
    """Segment pictures, all pictures of folders, and videos.

    Writes STEM.labels.png into the output folder: class ids at the picture's own size, 8-bit (16-bit above 256
    classes). What cannot be read is named at the end, the others are done, and the exit code is 1.

    A video is a file, a camera's number, an address (rtsp://...) or a GStreamer pipeline; with --overlay it is written
    to STEM.overlay.mp4, without it only measured in frames per second.

    With --engine ray, one folder or prefix (s3://, gs://) of pictures is spread over a cluster. Pictures that have
    their labels already are left out, so a run that was stopped can be run again; failures are listed in
    failures.jsonl beside the results, and do not fail the job.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from internimage_deploy.cli.segment_video import segment_one_video
    from internimage_deploy.runtime.pipelines import files as jobs
    from internimage_deploy.runtime.pipelines.video import is_video
    from internimage_deploy.runtime.segmenter import Segmenter

    if (crop or stride) and not slide:
        raise click.UsageError("--crop and --stride need --slide")
    window = _window(crop, stride) if slide else None
    if engine == "ray":
        settings = {"backend": backend, "threads": threads, "resize": resize, "window": window, "batch": batch}
        results = {"overlay": overlay, "as_json": as_json, "recursive": recursive, "max_pixels": max_pixels}
        engines = {"trust_engine": trust_engine, "cuda_graphs": cuda_graphs}
        segment_on_cluster(model, inputs, output, cluster, **settings, **results, **engines)
        return
    videos = [str(given) for given in inputs if is_video(str(given))]
    inputs = tuple(given for given in inputs if str(given) not in videos)
    check_local((*inputs, output))
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks about odd metadata: the pixels decide
    todo = jobs.plan(inputs, recursive=recursive)
    if (live or frames) and not videos:
        raise click.UsageError("--live and --frames are for videos")
    segmenter = Segmenter.load(
        model,
        backend=backend,
        threads=threads,
        resize=resize,
        window=window,
        batch=batch,
        max_pixels=max_pixels,
        trust_engine=trust_engine,
        cuda_graphs=cuda_graphs,
    )
    failures: list[tuple[str, UserError]] = []
    bar = Progress(
        TextColumn("segmenting"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not os.isatty(2),
    )
    with segmenter:
        _make_folder(output)
        for source in videos:
            try:
                segment_one_video(segmenter, source, output, overlay=overlay, live=live, most_frames=frames)
            except UserError as error:
                failures.append((source, error))
        bad_videos = len(failures)
        if todo:
            with bar:
                task = bar.add_task("", total=len(todo))

                def done(job: jobs.Job, error: UserError | None) -> None:
                    if error is not None:
                        failures.append((str(job.source), error))
                    bar.advance(task)

                def write(job: jobs.Job, result: Any) -> None:
                    target = output / job.stem
                    if target.parent != output:
                        _make_folder(target.parent)
                    _write_result(target, job.source, model, result, overlay=overlay, as_json=as_json)

                try:
                    jobs.run(segmenter, todo, write, done)
                except jobs.WriteFailure as failure:
                    raise failure.reason from failure
    total = len(videos) + len(todo)
    if total == len(failures) == 1:
        raise failures[0][1]
    for source, reason in failures:
        text = str(reason)
        click.echo(f"failed: {text if source in text else f'{source}: {text}'}", err=True)
    if todo:
        good = len(todo) - (len(failures) - bad_videos)
        click.echo(f"segmented {good} of {len(todo)} {'picture' if len(todo) == 1 else 'pictures'} into {output}")
    if failures:
        kinds = " and ".join(kind for kind, there in (("pictures", todo), ("videos", videos)) if there)
        raise UserError(f"{len(failures)} of {total} {kinds} could not be segmented; they are named above")


def _window(crop: tuple[int, int] | None, stride: tuple[int, int] | None) -> Any:
    from internimage_deploy.runtime.imaging.sliding import Window, default_stride

    if crop is None:
        if stride is not None:
            raise click.UsageError("--stride needs --crop")
        return "slide"
    try:
        return Window(crop, stride or default_stride(crop))
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"cannot write into {folder}: it is a file, expected a folder") from error
    except OSError as error:
        raise write_error(folder, error) from error


def _write_result(target: Path, source: Path, model: Path, result: Any, *, overlay: bool, as_json: bool) -> None:
    labels = result.labels if result.labels.dtype == np.uint8 else result.labels.astype(np.uint16)
    atomic_write(target.with_name(f"{target.name}.labels.png"), _png(labels))
    if overlay:
        painted = np.ascontiguousarray(result.overlay()[:, :, ::-1])
        atomic_write(target.with_name(f"{target.name}.overlay.png"), _png(painted))
    if as_json:
        facts = {"image": source.name, "model": model.name, **result.summary()}
        atomic_write(target.with_name(f"{target.name}.json"), json.dumps(facts, indent=1) + "\n")


def _png(pixels: npt.NDArray[Any]) -> bytes:
    import cv2

    good, data = cv2.imencode(".png", pixels)
    if not good:
        raise RuntimeError(f"OpenCV could not encode {pixels.dtype} {pixels.shape} as PNG")
    return bytes(data)
