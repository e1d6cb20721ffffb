# SPDX-License-Identifier: Apache-2.0
"""`segment`: images, folders and videos to label maps, overlays and class fractions."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from internimage_deploy.cli.cluster_options import check_local, cluster_options
from internimage_deploy.cli.options import (
    backend_option,
    batch_option,
    engine_options,
    max_pixels_option,
    model_argument,
    resize_option,
    threads_option,
    window_of,
    window_options,
)
from internimage_deploy.errors import UserError
from internimage_deploy.files import make_folder
from internimage_deploy.runtime.imaging.image_io import MAX_PIXELS
from internimage_deploy.runtime.imaging.results import OVERLAY_VIDEO, ResultOptions
from internimage_deploy.runtime.options import LoadOptions
from internimage_deploy.runtime.pipelines.storage import Location

if TYPE_CHECKING:
    from internimage_deploy.runtime.cluster.connect import Cluster
    from internimage_deploy.runtime.pipelines.files import Report
    from internimage_deploy.runtime.pipelines.find import ImageFile
    from internimage_deploy.runtime.pipelines.video import Progress
    from internimage_deploy.runtime.segmenter import Segmenter


@click.command()
@model_argument
@click.argument("inputs", metavar="IMAGE|FOLDER|VIDEO...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, help="Folder for the results, or an object store's prefix.")
@click.option("--overlay", is_flag=True, help="Also write STEM.overlay.png, the image with its labels over it.")
@click.option("--json", "as_json", is_flag=True, help="Also write STEM.json: classes with pixels and fractions.")
@resize_option
@click.option("--recursive", is_flag=True, help="Search folders to any depth; results keep the subfolders.")
@click.option("--skip-existing", is_flag=True, help="Leave out images that have a label map in the output already.")
@batch_option(1)
@window_options
@max_pixels_option(MAX_PIXELS)
@click.option("--live", is_flag=True, help="Drop frames of a video rather than fall behind.")
@click.option("--frames", type=click.IntRange(1), help="Number of frames after which a video ends.")
@backend_option
@engine_options
@threads_option
@cluster_options
def segment(
    model: Path,
    inputs: tuple[str, ...],
    output: str,
    overlay: bool,
    as_json: bool,
    resize: Any,
    recursive: bool,
    skip_existing: bool,
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
    executor: str,
    ray_address: str | None,
    replicas: tuple[int, int],
    gpus: float,
    cpus: float,
) -> None:
    """Segment images, all images of folders or object store prefixes (s3://, gs://), and videos.

    Writes STEM.labels.png into the output folder: class ids at the image's own size, 8-bit (16-bit above 256 classes).
    Images that cannot be read or segmented are named at the end and listed in failures.jsonl beside the results; the
    others are done, and the exit code is 1.

    A video is a file, a camera's number, an address (rtsp://...) or a GStreamer pipeline; with --overlay it is written
    to STEM.overlay.mp4, without it only measured in frames per second.

    With --executor ray, the images are spread over a Ray cluster, whose machines must all be able to read the model and
    the images and to write the results.
    """
    from internimage_deploy.runtime.pipelines.video import is_video

    options = LoadOptions(
        backend=backend,
        threads=threads,
        resize=resize,
        window=window_of(slide, crop, stride),
        batch=batch,
        max_pixels=max_pixels,
        trust_engine=trust_engine,
        cuda_graphs=cuda_graphs,
    )
    videos = [given for given in inputs if is_video(given)]
    others = [Location(given) for given in inputs if given not in videos]
    if (live or frames) and not videos:
        raise click.UsageError("--live and --frames are for videos")
    if executor == "ray" and videos:
        raise click.UsageError(f"{videos[0]}: videos are segmented on one machine; leave --executor ray out")
    if executor == "local":
        check_local()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks about odd metadata: the pixels decide
    results = ResultOptions(overlay, as_json)
    run = _Run(model, options, others, Location(output), results, recursive, skip_existing)
    if executor == "ray":
        from internimage_deploy.runtime.cluster.connect import Cluster

        run.on_cluster(Cluster(ray_address, replicas, gpus, cpus))
    else:
        run.here(videos, live=live, frames=frames)
    run.finish()


class _Run:
    """One run of the command: what is to be done, and how it went."""

    def __init__(
        self,
        model: Path,
        options: LoadOptions,
        inputs: list[Location],
        output: Location,
        results: ResultOptions,
        recursive: bool,
        skip_existing: bool,
    ) -> None:
        from internimage_deploy.runtime.pipelines.files import Report, ResultWriter
        from internimage_deploy.runtime.pipelines.find import find_images

        self.model, self.options, self.output, self.results = model, options, output, results
        self.report: Report = Report()
        self.videos = 0
        found = find_images(inputs, recursive=recursive)
        self.writer = ResultWriter(output, results, model.name)
        self.images = self.writer.without_finished(found) if skip_existing else found
        self.report.skipped = len(found) - len(self.images)

    def here(self, videos: list[str], *, live: bool, frames: int | None) -> None:
        """Segment on this machine, videos first."""
        from internimage_deploy.runtime.pipelines.files import WriteFailure, segment_files
        from internimage_deploy.runtime.segmenter import Segmenter

        self.videos = len(videos)
        if not videos and not self.images:
            return
        with Segmenter.from_options(self.model, self.options) as segmenter:
            if not self.output.is_address:
                make_folder(Path(self.output.uri))
            elif videos:
                raise UserError(f"{self.output}: videos are written to folders only; name a folder for --output")
            for source in videos:
                try:
                    _segment_video(segmenter, source, Path(self.output.uri), self.results.overlay, live, frames)
                except UserError as error:
                    self.report.failed.append((source, str(error)))
            with self._progress() as advance:

                def done(image: ImageFile, error: UserError | None) -> None:
                    self._count(str(image), "" if error is None else str(error))
                    advance()

                try:
                    segment_files(segmenter, self.images, self.writer, done)
                except WriteFailure as failure:
                    raise failure.reason from failure

    def on_cluster(self, cluster: Cluster) -> None:
        """Segment on a Ray cluster."""
        from internimage_deploy.onnx_tools.model_file import read_card
        from internimage_deploy.runtime.cluster.batch import segment_on_cluster

        if not self.images:
            return
        if self.model.suffix == ".onnx":
            read_card(self.model)  # a broken file is better found here than on every machine
        with self._progress() as advance:

            def done(image: str, error: str) -> None:
                self._count(image, error)
                advance()

            output = self.output if self.output.is_address else Location(str(Path(self.output.uri).absolute()))
            images = [image.absolute() for image in self.images]
            segment_on_cluster(self.model.absolute(), self.options, images, output, self.results, cluster, done)

    def finish(self) -> None:
        """Say how it went. Raises `UserError` if anything failed."""
        report = self.report
        self.writer.write_failures(report)
        total = self.videos + len(self.images)
        if total == len(report.failed) == 1:
            raise UserError(_named(*report.failed[0]))
        for failure in report.failed:
            click.echo(f"failed: {_named(*failure)}", err=True)
        if self.images or report.skipped:
            skipped = f", {report.skipped} were there already" if report.skipped else ""
            noun = "image" if len(self.images) == 1 else "images"
            click.echo(f"segmented {report.done} of {len(self.images)} {noun} into {self.output}{skipped}")
        if report.failed:
            kinds = " and ".join(kind for kind, there in (("images", self.images), ("videos", self.videos)) if there)
            raise UserError(f"{len(report.failed)} of {total} {kinds} could not be segmented; they are named above")

    def _count(self, image: str, error: str) -> None:
        if error:
            self.report.failed.append((image, error))
        else:
            self.report.done += 1

    def _progress(self) -> _ProgressBar:
        return _ProgressBar(len(self.images))


class _ProgressBar:
    """A bar on a terminal, nothing elsewhere; `with` gives the function that advances it by one image."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("segmenting"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not total or not os.isatty(2),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda: self._bar.advance(self._task)

    def __exit__(self, *_error: object) -> None:
        self._bar.stop()


def _named(source: str, reason: str) -> str:
    return reason if source in reason else f"{source}: {reason}"


def _segment_video(
    segmenter: Segmenter, source: str, folder: Path, overlay: bool, live: bool, frames: int | None
) -> None:
    from internimage_deploy.runtime.pipelines.video import segment_video, stem

    target = folder / f"{stem(source)}{OVERLAY_VIDEO}" if overlay else None
    shown = sys.stderr.isatty()

    def report(progress: Progress) -> None:
        if shown:
            click.echo(f"\r{_speed(progress)}   ", err=True, nl=False)

    progress = segment_video(segmenter, source, target, live=live, max_frames=frames, report=report)
    if shown:
        click.echo("\r", err=True, nl=False)
    click.echo(f"{source}: {_speed(progress)}{f', wrote {target}' if target else ''}")


def _speed(progress: Progress) -> str:
    dropped = f", {progress.dropped} dropped" if progress.dropped else ""
    return f"{progress.frames} frames, {progress.fps:.1f} per second{dropped}"
